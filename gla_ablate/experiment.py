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

from gla_ablate.config import Config, check_type, fill, interpolate, located, merge, resolve, to_dict
from gla_ablate.errors import ConfigError, nearest
from gla_ablate.grid import MISSING, Axis, Row, build_axes, fix, leaves, lookup, matches, points, spell
from gla_ablate.matching import check_free, matched, measures, solved_for
from gla_ablate.yaml_io import parse_yaml, read_yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Keys that tell no two trials' results apart, or that stand elsewhere in a trial's name.
NOT_IDENTITY = ("seed", "plugins", "trainer.log_every", "trainer.max_time")
METRICS = (
    "val/loss",
    "val/ppl",
    "val/bpb",
    "val/accuracy",
    "train/loss",
    "train/grad_norm",
    "train/tokens_per_s",
    "lr",
)
LABEL_LENGTH = 80  # characters of a folder's name before the hash


@dataclass
class ReportSettings:
    """What the report compares: a logged tag, which end of it is good, the points that others are held against, and
    the factors that aren't in question, such as a learning rate that is swept for each variant."""

    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    pick: Literal["last", "best"] = "last"  # which of a trial's values of the metric
    baseline: dict[str, Any] = field(default_factory=dict)  # dotted key → value; empty: none
    best_over: str | list[str] = field(default_factory=list)  # factors; each variant is reported at its best of them

    def __post_init__(self) -> None:
        self.best_over = [self.best_over] if isinstance(self.best_over, str) else self.best_over


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
    match: str | None = None  # the key that is solved for, so that models have as many parameters

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


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in the file at `path`, with `key=value` overrides of the command line.

    An override holds for every trial, fixes the axis that it touches, and `seeds=[…]` replaces the seeds. Raises
    `ConfigError` for any mistake that shows before the grid is expanded.
    """
    given = _parse_overrides(overrides)
    content = read_yaml(path)
    with located(path):
        file = fill(ExperimentFile, content)
        _check_name(file.name)
        _check_metric(file.report.metric)
    values = to_dict(Config())
    for name in file.base:
        part = _find_part(name, path)
        layer = read_yaml(part)
        with located(part):
            values = _lay(values, layer)
    with located(path):
        values = _lay(values, file.set)
        values["plugins"] = [str((path.parent / Path(plugin).expanduser()).resolve()) for plugin in file.plugins]
        axes = build_axes(file.grid, file.zip)
        for row in (row for axis in axes for row in axis):
            _lay(values, row)
        _check_conditions(values, axes, file)
        match = solved_for(file.match)
        if match:
            check_free(match, {leaf for axis in axes for row in axis for key in row for leaf in leaves(key, row[key])})
        _check_best_over(file.report, [key for axis in axes for key in axis[0]])
        seeds = _check_seeds(file.seeds)
    with located("command line"):
        if "seeds" in given:
            seeds = _check_seeds(check_type(given.pop("seeds"), list[int], "seeds"))
        _lay(values, given)
        for key, value in given.items():
            axes = [fix(axis, key, value) for axis in axes]
    return Experiment(file.name, path, values, axes, given, file.exclude, seeds, file.report, match)


def trials(experiment: Experiment) -> list[Trial]:
    """Every trial of the grid in order, seeds varying fastest, each config resolved and checked.

    Raises `ConfigError` for a point that makes no valid trial, for two trials with the same identity, and for a grid
    that `exclude` leaves empty.
    """
    where = f"{experiment.path} with {spell(experiment.overrides)}" if experiment.overrides else str(experiment.path)
    grid: list[tuple[Row, Config]] = []
    laid: list[dict[str, Any]] = []
    with located(where):
        for point in points(experiment.axes):
            given = merge(merge(experiment.values, point), experiment.overrides)
            values = interpolate(given)
            if any(matches(values, condition) for condition in experiment.exclude):
                continue
            try:
                config = resolve(values)
            except ConfigError as error:
                at = f" (at {spell(point)})" if point else ""
                raise ConfigError(f"{error}{at}") from error
            grid.append((point, config))
            laid.append(given)
        if not grid:
            raise ConfigError("exclude: leaves no point of the grid")
        if experiment.match:
            configs = matched(grid, measures(grid, laid, experiment.report.baseline), experiment.match)
            grid = [(point, config) for (point, _), config in zip(grid, configs, strict=True)]
        return _with_seeds(grid, experiment.seeds)


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

    content = to_dict(config)
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


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
        raise ConfigError(
            f"name: got {name!r}, takes letters, digits, '-', '_' and '.', and stays in the output folder"
        )


def _check_metric(tag: str) -> None:
    if tag not in METRICS and not tag.startswith("gate/"):  # gate/layer0/head0/memory and its like
        raise ConfigError(
            f"report.metric: no such metric {tag!r}{nearest(tag, METRICS)} (valid: {', '.join(METRICS)}, gate/…)"
        )


def _check_seeds(seeds: list[int]) -> list[int]:
    if not seeds:
        raise ConfigError("seeds: empty list, takes at least one")
    for i, seed in enumerate(seeds):
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seeds[{i}]: got {seed}, takes a whole number from 0 to 4294967295")
        if seed in seeds[:i]:
            raise ConfigError(f"seeds: {seed} stands twice")
    return seeds


def _find_part(name: str, experiment: Path) -> Path:
    """The file that `base` names: `model/tiny` is `model/tiny.yaml` beside the experiment, or in `configs/`."""
    folders = (experiment.parent, CONFIGS)
    for folder in folders:
        part = folder / f"{name}.yaml"
        if part.is_file():
            return part
    known = {str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml")}
    valid = ", ".join(sorted(known))
    raise ConfigError(
        f"{experiment}: base: no part {name!r}{nearest(name, known)} (valid: {valid}, or a file beside it)"
    )


def _lay(values: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`layer` over `values`, with its keys and types checked so that a mistake is blamed on the file it stands in."""
    for key in layer:
        if key in ("seed", "plugins"):
            raise ConfigError(f"{key}: stands at the top of an experiment, as {'seeds' if key == 'seed' else key}")
    merged = merge(values, layer)
    fill(Config, interpolate(merged))
    return merged


def _check_conditions(values: dict[str, Any], axes: list[Axis], file: ExperimentFile) -> None:
    """Every entry of `exclude` and the baseline hit some point of the grid as it stands in the file."""
    conditions = {f"exclude[{i}]": condition for i, condition in enumerate(file.exclude)}
    if file.report.baseline:
        conditions["report.baseline"] = file.report.baseline
    grid = [interpolate(merge(values, point)) for point in points(axes)] if conditions else []
    for where, condition in conditions.items():
        for key in condition:
            if all(lookup(point, key) is MISSING for point in grid):
                known = {k for point in grid for k in _dotted(point)}
                raise ConfigError(f"{where}.{key}: no such key{nearest(key, known)}")
        if not any(matches(point, condition) for point in grid):
            raise ConfigError(f"{where}: {{{spell(condition)}}} matches no point of the grid")


def _check_best_over(report: ReportSettings, factors: list[str]) -> None:
    """What each variant is at its best over is varied by the grid, and is not what the baseline fixes."""
    where = "report.best_over"
    fixed = _dotted(report.baseline)
    for i, key in enumerate(report.best_over):
        if key not in factors:
            varied = ", ".join(factors) or "nothing"
            raise ConfigError(f"{where}: the grid doesn't vary {key!r}{nearest(key, factors)} (it varies: {varied})")
        if key in report.best_over[:i]:
            raise ConfigError(f"{where}: {key} stands twice")
        if any(other == key or other.startswith(f"{key}.") for other in fixed):
            raise ConfigError(f"{where}: report.baseline fixes {key}, the best of which is to be found")


def _dotted(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All dotted keys of nested mappings, those of the mappings included."""
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def _label(point: dict[str, Any]) -> str:
    """A point as part of a folder's name: `data_dependent-rank16-heads2`; letters, digits, `-`, `_` and `.` only."""
    words = []
    for key, value in point.items():
        options = value if isinstance(value, Mapping) else {key: value}
        for option, choice in options.items():
            name = str(option).rpartition(".")[2]
            words.append(str(choice) if name == "name" else f"{name}{'' if _is_number(choice) else '-'}{choice}")
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))[:LABEL_LENGTH].strip("-._")
    return label or "base"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
