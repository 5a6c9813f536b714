"""An experiment YAML → a list of trials.

The values of a trial come in layers, each over the last: the schema's defaults, the parts named by `base`, `set`, the
grid point, the command line. The whole grid is checked before a caller sees a single trial.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gla_ablate.config import Config, ModelConfig, check_type, fill, located, merge, resolve, to_dict, without_unused
from gla_ablate.errors import ConfigError
from gla_ablate.experiment_checks import (
    check_best_over,
    check_conditions,
    check_equal,
    check_logged,
    check_metric,
    check_metric_of,
    check_name,
    check_seeds,
    check_used,
    is_better_large,
)
from gla_ablate.grid import Axis, Row, build_axes, fix, flatten, leaves, matches, points, spell, touches
from gla_ablate.interpolation import Interpolate, interpolator
from gla_ablate.matching import Measures, check_free, check_unreferenced, matched, solved_for
from gla_ablate.numeric import is_number
from gla_ablate.parts import called, check_parts, find_part, find_plugin, find_scale, over, spread
from gla_ablate.yaml_io import parse_yaml, read_yaml

# Keys that tell no two trials' results apart, or that stand elsewhere in a trial's name.
NOT_IDENTITY = ("seed", "plugins", "trainer.log_every", "trainer.max_time",
                "trainer.strategy", "trainer.devices", "trainer.num_nodes")  # fmt: skip
LABEL_LENGTH = 80  # characters of a folder's name before the hash


@dataclass
class ExpectEqual:
    """A factor that should change no curve of the metric, such as the op's chunk size, and by how much it may: a share
    of the metric that is far below what seeds differ by, and far above what rounding does."""

    over: str = ""  # empty: nothing is expected
    tolerance: float = 0.002


@dataclass
class ReportSettings:
    """What the report compares: a logged tag, which end of it is good, the points that others are held against, and
    the factors that aren't in question, such as a learning rate that is swept for each variant."""

    metric: str = "val/loss"
    mode: Literal["min", "max", "auto"] = "auto"  # auto: max for accuracy, speed and utilisation
    pick: Literal["last", "best"] = "last"  # which of a trial's values of the metric
    baseline: dict[str, Any] = field(default_factory=dict)  # dotted key → value; empty: none
    best_over: str | list[str] = field(default_factory=list)  # factors; each variant is reported at its best of them
    expect_equal: ExpectEqual = field(default_factory=ExpectEqual)

    def __post_init__(self) -> None:
        self.best_over = [self.best_over] if isinstance(self.best_over, str) else self.best_over
        if self.mode == "auto":
            self.mode = "max" if is_better_large(self.metric) else "min"


@dataclass
class ExperimentFile:
    """The keys of an experiment YAML."""

    name: str
    base: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    zip: list[dict[str, list[Any]]] = field(default_factory=list)
    exclude: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    report: ReportSettings = field(default_factory=ReportSettings)
    match: str | dict[str, str] | None = None  # params: models with as many parameters as the baseline (`matching`)
    plugins: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """An experiment with its parts merged and its grid laid out; what remains is to combine them (`trials`)."""

    name: str
    path: Path
    values: dict[str, Any]  # of every trial before its grid point
    axes: list[Axis]
    overrides: dict[str, Any]  # of every trial after its grid point
    exclude: list[dict[str, Any]]
    seeds: list[int]
    report: ReportSettings
    interpolate: Interpolate  # knows what it has resolved of this grid
    match: str | None = None  # the key that is solved for, so that models have as many parameters
    file_axes: list[Axis] = field(default_factory=list)  # as the YAML has them, before an override fixes one
    said: str = ""  # of the overrides on the command line, as a user would write them

    @property
    def factors(self) -> list[str]:
        """The dotted keys that the grid varies, in order."""
        return [key for axis in self.axes for key in axis[0]]


@dataclass(frozen=True)
class Trial:
    """One run: a grid point with a seed. `id` is the name of its folder."""

    id: str
    point: dict[str, Any]  # factor → value as the grid writes it
    seed: int
    config: Config


def load_experiment(path: Path, overrides: Sequence[str] = (), parts: Sequence[str] = ()) -> Experiment:
    """The experiment in the file at `path`, with `key=value` overrides of the command line.

    An override holds for every trial, fixes the axis that it touches, and `seeds=[…]` replaces the seeds. The files
    that `parts` name are overrides, too, before those, and end the experiment's name. Raises `ConfigError` for any
    mistake that shows before the grid is expanded.
    """
    typed = _parse_overrides(overrides)
    check_parts(parts, path)
    interpolate = interpolator()
    content = read_yaml(path)
    with located(path):
        file = fill(ExperimentFile, content)
        check_name(file.name)
        check_metric(file.report.metric)
    values = to_dict(Config())
    for name in file.base:
        part = find_part(name, path)
        layer = read_yaml(part)
        with located(part):
            values = _lay(values, layer, interpolate)
    with located(path):
        values = _lay(values, file.set, interpolate)
        values["plugins"] = [str(find_plugin(plugin, path)) for plugin in file.plugins]
        axes = build_axes(file.grid, file.zip)
        for row in (row for axis in axes for row in axis):
            _lay(values, row, interpolate)
        check_conditions(values, axes, file.exclude, file.report.baseline, interpolate)
        match = solved_for(file.match)
        if match:
            check_free(match, {leaf for axis in axes for row in axis for key in row for leaf in leaves(key, row[key])})
        factors = [key for axis in axes for key in axis[0]]
        check_best_over(list(file.report.best_over), file.report.baseline, factors)
        equal, best_over = file.report.expect_equal, list(file.report.best_over)
        check_equal(equal.over, equal.tolerance, best_over, factors, usual=ExpectEqual.tolerance)
        seeds = check_seeds(file.seeds)
    given: dict[str, Any] = {}
    for where, layer in [*_laid_over(path, parts), ("command line", typed)]:
        with located(where):
            layer = spread(layer)
            if "seeds" in layer:
                seeds = check_seeds(check_type(layer.pop("seeds"), list[int], "seeds"))
            _lay(values, over(given, layer), interpolate)
            given = over(given, layer)
    fixed = axes
    with located("command line"):
        for key, value in given.items():
            fixed = [fix(axis, key, value) for axis in fixed]
    said = [*(f"--part {part}" for part in parts), *([spell(typed)] if typed else [])]
    return Experiment(
        called(file.name, parts), path, values, fixed, given, file.exclude, seeds, file.report, interpolate, match,
        file_axes=axes, said=" ".join(said),
    )  # fmt: skip


def _laid_over(path: Path, parts: Sequence[str]) -> list[tuple[Path, dict[str, Any]]]:
    """The files that `--part` names, and what they hold."""
    files = [find_scale(part, path) for part in parts]
    return [(file, read_yaml(file)) for file in files]


def trials(experiment: Experiment) -> list[Trial]:
    """Every trial of the grid in order, seeds varying fastest, each config resolved and checked.

    Raises `ConfigError` for a point that makes no valid trial, for two trials with the same identity, and for a grid
    that `exclude` leaves empty.
    """
    where = f"{experiment.path} with {experiment.said}" if experiment.said else str(experiment.path)
    grid: list[tuple[Row, Config]] = []
    laid: list[dict[str, Any]] = []
    referring: list[dict[str, Any]] = []
    made: dict[int, ModelConfig] = {}
    resolved: list[dict[str, Any]] = []
    with located(where):
        for i, point in enumerate(points(experiment.axes)):
            given = merge(merge(experiment.values, point), experiment.overrides)
            values = experiment.interpolate(given)
            if any(matches(values, condition) for condition in experiment.exclude):
                continue
            try:
                config = resolve(values)
            except ConfigError as error:
                at = f" (at {spell(point)})" if point else ""
                raise ConfigError(f"{error}{at}") from error
            grid.append((point, config))
            made[i] = config.model
            laid.append(given)
            resolved.append(values)
            referring += [given] if experiment.match and values != given else []
        if not grid:
            raise ConfigError("exclude: leaves no point of the grid")
        check_metric_of(experiment.report.metric, [config for _, config in grid])
        check_logged(experiment.report.metric, [config for _, config in grid])
        if "model.mixer" not in {key for axis in experiment.file_axes for row in axis for key in row}:
            check_used(resolved, [config for _, config in grid])
        if experiment.match:
            check_unreferenced(experiment.match, referring, experiment.interpolate)
            measures = _measures(experiment, made)
            like = [measures.of(*at, values) for at, values in zip(grid, laid, strict=True)]
            configs = matched(grid, like, experiment.match)
            grid = [(point, config) for (point, _), config in zip(grid, configs, strict=True)]
        return _with_seeds(grid, experiment.seeds)


def _measures(experiment: Experiment, made: dict[int, ModelConfig]) -> Measures:
    """Of the grid in the file, with the overrides that hold for all of it; `made` has the models of the grid that is
    run, by the numbers of their points."""
    axes = experiment.file_axes
    everywhere = {k: v for k, v in experiment.overrides.items() if not touches(axes, k, v)}

    def lay(point: Row) -> dict[str, Any]:
        return merge(merge(experiment.values, point), everywhere)

    whole, baseline = list(points(axes)), experiment.report.baseline
    known = made if everywhere == experiment.overrides else {}  # else the two grids may be numbered apart
    return Measures(whole, baseline, experiment.exclude, lay, everywhere, experiment.interpolate, known)


def _with_seeds(grid: list[tuple[Row, Config]], seeds: list[int]) -> list[Trial]:
    """A trial for each point and seed. Raises `ConfigError` where two have the same identity."""
    found: dict[str, Trial] = {}
    for point, config in grid:
        hash = identity(config)
        for seed in seeds:
            key = f"{hash}-seed{seed}"
            if key in found:
                raise ConfigError(f"two points are the same trial: {spell(found[key].point)} and {spell(point)}")
            found[key] = Trial(f"{_label(point)}-{key}", point, seed, replace(config, seed=seed))
    return list(found.values())


def identity(config: Config) -> str:
    """12 hex digits that are equal for configs with equal results, up to the seed: the start of the sha256 of the
    config without `NOT_IDENTITY`, and of the file that the gate came from, if it is a plugin's. (8 were the same for
    two of 10,000 points once in a hundred grids.)"""
    from gla_ablate.model import plugin_sha256  # here, so that `import gla_ablate.experiment` stays light

    content = without_unused(to_dict(config))
    for key in NOT_IDENTITY:
        *sections, name = key.split(".")
        del (content[sections[0]] if sections else content)[name]
    content["plugin"] = plugin_sha256(config.model.gate["name"])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def record(experiment: Experiment, trials: list[Trial], command: str) -> dict[str, Any]:
    """What `experiment.json` holds: all that a report needs to know of the grid."""
    return {
        "name": experiment.name,
        "command": command,
        "factors": experiment.factors,
        "report": asdict(experiment.report),
        "trials": [{"id": trial.id, "point": trial.point, "seed": trial.seed} for trial in trials],
    }


def _parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """`["model.heads=4"]` → `{"model.heads": 4}`; a value is read as YAML."""
    given = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ConfigError(f"command line: got {text!r}, takes key=value")
        with located(f"command line: {key}"):
            given[key] = parse_yaml(value)
    return given


def _lay(values: dict[str, Any], layer: Mapping[str, Any], interpolate: Interpolate) -> dict[str, Any]:
    """`layer` over `values`, with its keys and types checked so that a mistake is blamed on the file it stands in."""
    for key in layer:
        if key in ("seed", "seeds", "plugins"):
            elsewhere = ", or in what --part names" if key == "seeds" else ""
            name = "seeds" if key == "seed" else key
            raise ConfigError(f"{key}: stands at the top of an experiment, as {name}{elsewhere}")
    merged = merge(values, layer)
    fill(Config, interpolate(merged))
    return merged


def _label(point: dict[str, Any]) -> str:
    """A point as part of a folder's name: `data_dependent-rank16-heads2`; letters, digits, `-`, `_` and `.` only."""
    words = []
    for key, value in flatten(point).items():
        name = key.rpartition(".")[2]
        value = "_".join(map(str, value)) if isinstance(value, list) else value
        words.append(str(value) if name == "name" else f"{name}{'' if is_number(value) else '-'}{value}")
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))[:LABEL_LENGTH].strip("-._")
    return label or "base"
