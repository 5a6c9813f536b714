"""What a factor does with all else the same: its main effect, from differences over seeds (`intervals`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gla_ablate.report.intervals import Interval
from gla_ablate.report.labels import Labels, flatten, identity
from gla_ablate.report.points import Point, common_seeds, difference, mean_or_none
from gla_ablate.report.trials import Settings


@dataclass(frozen=True)
class Level:
    """One value of a factor: `mean` of the metric over the settings of all other factors that every level has (where
    there is none such, over its own), and its `effect`, the difference to the reference level, all else the same."""

    values: dict[str, Any]  # factor → value
    mean: float | None
    effect: Interval | None  # None where no setting of the others has both; of the reference itself, too
    settings: int  # of the other factors, at which it meets the reference


@dataclass(frozen=True)
class Effect:
    """A factor's main effect. Factors that vary together can't be told apart, and stand as one."""

    factors: tuple[str, ...]
    levels: list[Level]  # in grid order
    reference: int  # which of them the others are held against: the baseline's value, else the first


def main_effects(grid: list[Point], labels: Labels, settings: Settings) -> list[Effect]:
    """Of every factor that varies, in grid order."""
    return [main_effect(group, grid, labels, settings) for group in together(grid, labels.varying)]


def together(grid: list[Point], factors: list[str]) -> list[tuple[str, ...]]:
    """The factors, those in one group that change only with each other, as a `zip` makes them."""
    patterns: dict[tuple[int, ...], list[str]] = {}
    for factor in factors:
        values = [identity(point.values.get(factor)) for point in grid]
        patterns.setdefault(tuple(values.index(value) for value in values), []).append(factor)
    return [tuple(group) for group in patterns.values()]


def main_effect(group: tuple[str, ...], grid: list[Point], labels: Labels, settings: Settings) -> Effect:
    others = [factor for factor in labels.varying if factor not in group]
    by_level: dict[str, dict[str, Point]] = {}  # level → setting of the other factors → point
    values: dict[str, dict[str, Any]] = {}
    for point in grid:
        own = {factor: point.values.get(factor) for factor in group}
        level = identity(own)
        values.setdefault(level, own)
        by_level.setdefault(level, {})[identity([point.values.get(factor) for factor in others])] = point
    reference = reference_of(list(values.values()), settings)
    known = [{where for where, point in points.items() if point.mean is not None} for points in by_level.values()]
    shared = set.intersection(*known)
    against = list(by_level.values())[reference]
    levels = []
    for i, (level, points) in enumerate(by_level.items()):
        where = shared or known[i]
        common = [place for place in points if place in against and common_seeds(points[place], against[place])]
        levels.append(
            Level(
                values=values[level],
                mean=mean_or_none(point.mean for place, point in points.items() if place in where),
                effect=None if i == reference else difference([(against[place], points[place]) for place in common]),
                settings=len(common),
            )
        )
    return Effect(group, levels, reference)


def reference_of(levels: list[dict[str, Any]], settings: Settings) -> int:
    """The level that has all of the baseline's values that concern it; the first if none has, or several."""
    wanted = flatten(settings.baseline)
    flat = [flatten(level) for level in levels]
    own = {key for level in flat for key in level} & wanted.keys()
    found = [i for i, level in enumerate(flat) if own and all(level.get(key) == wanted[key] for key in own)]
    return found[0] if len(found) == 1 else 0
