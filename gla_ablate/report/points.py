"""From trials to grid points: mean, sample std and number of seeds, and the difference of two points over seeds."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gla_ablate.report.intervals import Interval, interval
from gla_ablate.report.labels import identity
from gla_ablate.report.trials import Experiment, Settings, Trial


@dataclass(frozen=True)
class Point:
    """One point of the grid over its seeds. What its trials that count agree on or average; None where none does."""

    values: dict[str, Any]  # factor → value
    trials: list[Trial]
    mean: float | None
    std: float | None  # sample standard deviation over seeds; None for one seed
    n: int  # trials in the mean
    baseline: dict[str, Any] | None  # the values of its baseline (`baselines`), itself if it is one
    against: Interval | None  # the metric less the baseline's, seed by seed; None without a seed that both have
    params: int | None
    state_size: int | None  # numbers that all layers carry from token to token, one sequence
    flops_per_token: float | None
    tokens_per_s: float | None  # mean over seeds
    peak_mem_mb: float | None  # largest over seeds
    backend: str | None  # of the op; several, comma-separated, if seeds differ

    @functools.cached_property
    def by_seed(self) -> dict[int, float]:
        """Seed → metric of each trial that counts."""
        return {t.seed: t.value for t in self.trials if t.counts and t.value is not None}

    @property
    def delta(self) -> float | None:
        """The mean difference to the baseline."""
        return None if self.against is None else self.against.mean

    @property
    def is_baseline(self) -> bool:
        return self.baseline == self.values

    def state(self) -> str:
        """What became of the trials that don't count: `1 failed, 2 queued`."""
        states = Counter("no value" if t.status == "finished" else t.status for t in self.trials if not t.counts)
        return ", ".join(f"{count} {state}" if len(self.trials) > 1 else state for state, count in states.items())


def points(experiment: Experiment) -> list[Point]:
    """The grid's points in grid order, without baselines."""
    groups: dict[str, list[Trial]] = {}
    for trial in experiment.trials:
        groups.setdefault(identity(trial.point), []).append(trial)
    return [point(trials) for trials in groups.values()]


def point(trials: list[Trial]) -> Point:
    """The point of `trials`, which share it; without a baseline."""
    counted = [trial for trial in trials if trial.counts]
    values = [t.value for t in counted if t.value is not None]

    def each(key: str) -> list[Any]:
        return [t.result[key] for t in counted if t.result.get(key) is not None]

    return Point(
        values=trials[0].point,
        trials=trials,
        mean=mean_or_none(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
        baseline=None,
        against=None,
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


def paired(first: Point, second: Point) -> Interval | None:
    """Of the metric, second − first, over the seeds that both have; None if they share none."""
    common = sorted(first.by_seed.keys() & second.by_seed.keys())
    return interval(second.by_seed[seed] - first.by_seed[seed] for seed in common)


def ranked(grid: list[Point], settings: Settings) -> list[Point]:
    """Best first; points without a mean last, in grid order."""
    sign = 1 if settings.mode == "min" else -1
    return sorted(grid, key=lambda p: (p.mean is None, sign * (p.mean or 0.0)))
