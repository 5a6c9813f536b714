"""`report: {best_over: optim.lr}`: each variant of the grid at the best value of factors that aren't in question.

A variant is a point of the grid without those factors. Its best value is the one with the best mean of the metric that
is reported, too, which flatters every variant, and one that was tried at more values the most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gla_ablate.numeric import is_number
from gla_ablate.report.baselines import with_baselines
from gla_ablate.report.labels import identity
from gla_ablate.report.points import Point, ranked
from gla_ablate.report.trials import Settings


@dataclass(frozen=True)
class Variant:
    """The points that differ in the factors of `best_over` alone, in grid order, and the best of those of which the
    most seeds count; the first where none has a mean."""

    tried: list[Point]
    best: Point

    @property
    def known(self) -> int:
        """The values that were tried."""
        return sum(map(was_tried, self.tried))

    def edge(self, factor: str) -> str:
        """`largest` or `smallest` if the best value of `factor` lies at that end of those that were tried, so that a
        better one may lie beyond; empty if it doesn't, or if they have no order."""
        values = {p.values[factor] for p in self.tried if is_number(p.values[factor]) and was_tried(p)}
        best = self.best.values[factor]
        if self.best.mean is None or len(values) < 2 or not is_number(best):
            return ""
        return {max(values): "largest", min(values): "smallest"}.get(best, "")


def variants(grid: list[Point], settings: Settings) -> list[Variant]:
    """In grid order. Their best points are held against baselines that are at their best, too."""
    groups: dict[str, list[Point]] = {}
    for point in grid:
        rest = {factor: value for factor, value in point.values.items() if factor not in settings.best_over}
        groups.setdefault(identity(rest), []).append(point)
    best = [ranked(most_seeds(tried), settings)[0] for tried in groups.values()]
    held = with_baselines(best, settings, ignored=settings.best_over)
    return [Variant(tried, point) for tried, point in zip(groups.values(), held, strict=True)]


def most_seeds(tried: list[Point]) -> list[Point]:
    """Those of which as many seeds count as of any: where most diverged, the one that is left isn't the best."""
    most = max(point.n for point in tried)
    return [point for point in tried if point.n == most]


def passed_over(variant: Variant, settings: Settings) -> list[Point]:
    """The points of a variant whose mean is better than its best's, but over fewer seeds, which kept them out."""
    sign = 1 if settings.mode == "min" else -1
    best = variant.best.mean
    return [p for p in variant.tried if p.mean is not None and best is not None and sign * p.mean < sign * best]


def choice(point: Point, settings: Settings) -> dict[str, Any]:
    """The point's values of the factors of `best_over`."""
    return {factor: point.values[factor] for factor in settings.best_over if factor in point.values}


def choices(grid: Iterable[Point], settings: Settings) -> list[dict[str, Any]]:
    """All that occur in `grid`: by size where they are numbers, else in grid order."""
    found = {identity(chosen): chosen for chosen in (choice(point, settings) for point in grid)}
    if all(is_number(value) for chosen in found.values() for value in chosen.values()):
        return sorted(found.values(), key=lambda chosen: tuple(chosen.values()))
    return list(found.values())


def was_tried(point: Point) -> bool:
    """Whether it has a mean, or a trial whose metric left the finite numbers, which is an answer too."""
    return point.mean is not None or any(t.status in ("finished", "diverged") for t in point.trials)
