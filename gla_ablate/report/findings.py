"""All that a report says, found once: the points that it compares, what each factor does, which points differ.

What follows (`tables`, `page`, `csvs`, `terminal`) only writes it down.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from gla_ablate.report.baselines import with_baselines
from gla_ablate.report.best import Variant, variants
from gla_ablate.report.effects import Effect, main_effects
from gla_ablate.report.intervals import Interval, verdict
from gla_ablate.report.labels import Labels, decimals, identity
from gla_ablate.report.points import Point, paired, points, ranked
from gla_ablate.report.trials import Experiment

ALL_PAIRS = 200  # points of which every pair is compared: 19,900; of more, each with the best one and its baseline


@dataclass(frozen=True)
class Pair:
    """Two points, the first no worse by its mean unless the second is its baseline."""

    first: Point
    second: Point
    difference: Interval | None  # first − second, seed by seed
    verdict: str  # on the first: better | worse | tie | one seed | no common seed


@dataclass(frozen=True)
class Findings:
    """`shown` are the points that are compared: the whole `grid`, or with `best_over` each variant at its best."""

    experiment: Experiment
    grid: list[Point]
    variants: list[Variant]  # empty without best_over
    shown: list[Point]
    labels: Labels  # of `shown`, without the factors of best_over
    all_labels: Labels  # of `grid`
    effects: list[Effect]
    pairs: list[Pair]

    @functools.cached_property
    def ranked(self) -> list[Point]:
        return ranked(self.shown, self.experiment.settings)

    @functools.cached_property
    def places(self) -> int:
        """Digits after the point of the metric, and of differences in it."""
        return decimals([p.mean for p in self.shown], [p.std for p in self.shown])


def find(experiment: Experiment) -> Findings:
    settings = experiment.settings
    grid = with_baselines(points(experiment), settings)
    all_labels = Labels(experiment.factors, [point.values for point in grid])
    found = variants(grid, settings) if settings.best_over else []
    shown = [variant.best for variant in found] or grid
    in_question = [factor for factor in experiment.factors if factor not in settings.best_over]
    labels = Labels(in_question, [point.values for point in shown]) if found else all_labels
    effects = main_effects(shown, labels, settings)
    return Findings(experiment, grid, found, shown, labels, all_labels, effects, pairs(shown, experiment))


def pairs(shown: list[Point], experiment: Experiment) -> list[Pair]:
    """Every pair of points that have a mean, best first; in a large grid each with the best and with its baseline."""
    settings = experiment.settings
    known = [point for point in ranked(shown, settings) if point.mean is not None]
    if len(known) <= ALL_PAIRS:
        return [pair(first, second, settings.mode) for first, second in itertools.combinations(known, 2)]
    by_values = {identity(point.values): point for point in known}
    best = known[0]
    found = [pair(best, point, settings.mode) for point in known[1:]]
    for point in known[1:]:
        baseline = None if point.baseline is None else by_values.get(identity(point.baseline))
        if baseline is not None and baseline is not point and baseline is not best:
            found.append(pair(point, baseline, settings.mode))
    return found


def pair(first: Point, second: Point, mode: str) -> Pair:
    difference = paired(second, first)
    return Pair(first, second, difference, verdict(difference, mode))
