"""From trials to grid points: mean, sample std and number of seeds, and the difference to each point's baseline."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gla_ablate.report.labels import flatten, identity
from gla_ablate.report.trials import Experiment, Settings, Trial


@dataclass(frozen=True)
class Point:
    """One point of the grid over its seeds. What its trials that count agree on or average; None where none does."""

    values: dict[str, Any]  # factor → value
    trials: list[Trial]
    mean: float | None
    std: float | None  # sample standard deviation over seeds; None for one seed
    n: int  # trials in the mean
    baseline: dict[str, Any] | None  # the values of its baseline, itself if it is one
    delta: float | None  # mean − baseline's mean
    params: int | None
    state_size: int | None  # numbers in the recurrent state of all layers, one sequence
    flops_per_token: float | None
    tokens_per_s: float | None  # mean over seeds
    peak_mem_mb: float | None  # largest over seeds
    backend: str | None  # of the op; several, comma-separated, if seeds differ

    @property
    def by_seed(self) -> dict[int, float]:
        """Seed → metric of each trial that counts."""
        return {t.seed: t.value for t in self.trials if t.counts and t.value is not None}

    @property
    def is_baseline(self) -> bool:
        return self.baseline == self.values

    def state(self) -> str:
        """What became of the trials that don't count: `1 failed, 2 queued`."""
        states = Counter("no value" if t.status == "finished" else t.status for t in self.trials if not t.counts)
        return ", ".join(f"{count} {state}" if len(self.trials) > 1 else state for state, count in states.items())


def points(experiment: Experiment) -> list[Point]:
    """The grid's points in grid order."""
    groups: dict[str, list[Trial]] = {}
    for trial in experiment.trials:
        groups.setdefault(identity(trial.point), []).append(trial)
    grid = [trials[0].point for trials in groups.values()]
    means = {key: mean_or_none([t.value for t in trials if t.counts]) for key, trials in groups.items()}
    return [point(trials, baseline_of(trials[0].point, grid, experiment.settings), means) for trials in groups.values()]


def point(trials: list[Trial], baseline: dict[str, Any] | None, means: dict[str, float | None]) -> Point:
    """The point of `trials`, which share it; `means` holds every point's mean by `identity`."""
    counted = [trial for trial in trials if trial.counts]
    values = [t.value for t in counted if t.value is not None]
    mean = means[identity(trials[0].point)]
    reference = None if baseline is None else means[identity(baseline)]

    def each(key: str) -> list[Any]:
        return [t.result[key] for t in counted if t.result.get(key) is not None]

    return Point(
        values=trials[0].point,
        trials=trials,
        mean=mean,
        std=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
        baseline=baseline,
        delta=None if mean is None or reference is None else mean - reference,
        params=max(each("params"), default=None),
        state_size=max(each("state_size"), default=None),
        flops_per_token=max(each("flops_per_token"), default=None),
        tokens_per_s=mean_or_none(each("tokens_per_s")),
        peak_mem_mb=max(each("peak_mem_mb"), default=None),
        backend=", ".join(sorted(set(each("backend")))) or None,
    )


def mean_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def baseline_of(values: dict[str, Any], grid: list[dict[str, Any]], settings: Settings) -> dict[str, Any] | None:
    """The point of `grid` that has the baseline's values and otherwise equals `values`; None if not exactly one does.

    A baseline that sets a `name` (`model.gate.name: none`) frees that mapping's other entries too, for they are
    options of the name and travel with it.
    """
    wanted = flatten(settings.baseline)
    families = tuple(key.removesuffix("name") for key in wanted if key.endswith(".name"))

    def rest(point: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in flatten(point).items() if k not in wanted and not k.startswith(families)}

    def is_one(point: dict[str, Any]) -> bool:
        flat = flatten(point)
        return all(key in flat and flat[key] == value for key, value in wanted.items())

    if not wanted:
        return None
    if is_one(values):
        return values
    candidates = [point for point in grid if is_one(point) and rest(point) == rest(values)]
    return candidates[0] if len(candidates) == 1 else None


def ranked(grid: list[Point], settings: Settings) -> list[Point]:
    """Best first; points without a mean last, in grid order."""
    sign = 1 if settings.mode == "min" else -1
    return sorted(grid, key=lambda p: (p.mean is None, sign * (p.mean or 0.0)))
