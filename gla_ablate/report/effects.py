"""What a factor does with all else the same: its main effect, from differences over seeds (`intervals`).

All values of a factor are held against each other over the same settings of the other factors and the same seeds
(`balance`), so that an effect is the difference of two means, and a seed's difference is over what every seed's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gla_ablate.grid import flatten
from gla_ablate.report.balance import Block, Trials, arranged, balanced, pairwise
from gla_ablate.report.intervals import Interval, interval
from gla_ablate.report.labels import Labels, identity
from gla_ablate.report.points import Point
from gla_ablate.report.trials import Settings

NOTHING_IN_COMMON = "never beside it"  # of a level and the reference


@dataclass(frozen=True)
class Level:
    """One value of a factor: `mean` of the metric and `effect`, the difference to the reference level, over settings
    and seeds that all levels have. A level that has too little of them stands `apart`: it has no mean, and its effect
    is over what it has in common with the reference alone."""

    values: dict[str, Any]  # factor → value
    mean: float | None
    effect: Interval | None  # None where it never meets the reference; of the reference itself, too
    settings: int  # of the other factors, that the effect is over
    apart: bool = False  # with trials that count


@dataclass(frozen=True)
class Effect:
    """A factor's main effect. Factors that vary together can't be told apart, and stand as one."""

    factors: tuple[str, ...]
    levels: list[Level]  # in grid order
    reference: int  # which of them the others are held against: the baseline's value, else the first
    settings: int  # of the other factors in the grid
    seeds: int  # of the grid
    without: list[dict[str, Any]]  # settings of the other factors that its levels aren't compared at
    without_seeds: list[int]
    unused: int  # trials that count, of levels that don't stand apart, at these settings or with these seeds


def main_effects(grid: list[Point], labels: Labels, settings: Settings) -> list[Effect]:
    """Of every factor that varies, in grid order."""
    return [main_effect(group, grid, labels, settings) for group in together(grid, labels.varying)]


def together(grid: list[Point], factors: list[str]) -> list[tuple[str, ...]]:
    """The factors, in one group those that change only with each other, as a `zip` makes them, or only with one that
    has more values: nothing is the same but for such a factor, so that it has no effect of its own."""
    patterns: dict[str, tuple[int, ...]] = {}
    for factor in factors:
        first: dict[str, int] = {}  # value → the point that has it first
        values = (identity(point.values.get(factor)) for point in grid)
        patterns[factor] = tuple(first.setdefault(value, i) for i, value in enumerate(values))
    kinds = list(dict.fromkeys(patterns.values()))
    # of a chain that determine each other, the one that all of them follow; where several could be it, the first
    heads = [kind for kind in kinds if not any(other != kind and determines(other, kind) for other in kinds)]
    groups: dict[tuple[int, ...], list[str]] = {}
    for factor, kind in patterns.items():
        groups.setdefault(next(head for head in heads if determines(head, kind)), []).append(factor)
    return [tuple(group) for group in groups.values()]


def determines(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether points that are alike in one factor are so in the other."""
    return len(set(zip(one, other, strict=True))) == len(set(one))


def main_effect(group: tuple[str, ...], grid: list[Point], labels: Labels, settings: Settings) -> Effect:
    own = [{factor: point.values.get(factor) for factor in group} for point in grid]
    values = {identity(level): level for level in own}
    place = {level: i for i, level in enumerate(values)}
    others = [factor for factor in labels.varying if factor not in group]
    trials = arranged(grid, [place[identity(level)] for level in own], others)
    counted = trials.counted
    reference = reference_of(own, grid, list(values.values()), settings)
    known = counted[reference].any()
    block = balanced(counted, reference if known else int(counted.sum(axis=(1, 2)).argmax()))
    levels = []
    for i, level in enumerate(values.values()):
        inside = bool(block.members[i]) and block.size > 0
        over = block if inside else pairwise(counted, i, reference)
        effect = effect_over(over, trials, i, reference) if known and i != reference else None
        levels.append(
            Level(
                level,
                mean=float(over.of(trials.values[i]).mean()) if inside else None,
                effect=effect,
                settings=int(over.settings.sum()) if effect else 0,
                apart=not inside and bool(counted[i].any()),
            )
        )
    return Effect(
        group,
        levels,
        reference,
        settings=len(trials.settings),
        seeds=len(trials.seeds),
        without=[setting for setting, kept in zip(trials.settings, block.settings, strict=True) if not kept],
        without_seeds=[seed for seed, kept in zip(trials.seeds, block.seeds, strict=True) if not kept],
        unused=int(counted[block.members].sum()) - int(block.members.sum()) * block.size,
    )


def effect_over(block: Block, trials: Trials, level: int, reference: int) -> Interval | None:
    """level − reference: averaged over the settings of one seed, then over seeds."""
    differences = block.of(trials.values[level]) - block.of(trials.values[reference])  # [settings, seeds]
    return interval(np.mean(differences, axis=0).tolist()) if differences.size else None


def reference_of(own: list[dict[str, Any]], grid: list[Point], levels: list[dict[str, Any]], settings: Settings) -> int:
    """The level that has all of the baseline's values that concern it, or else the one level of all points that are a
    baseline, which may owe a value to a default; the first if there is none such, or several. `own` are the levels of
    the points of `grid`."""
    wanted = flatten(settings.baseline)
    flat = [flatten(level) for level in levels]
    concerned = {key for level in flat for key in level} & wanted.keys()
    found = [i for i, level in enumerate(flat) if all(level.get(key) == wanted[key] for key in concerned)]
    if concerned and not found:
        baselines = [level for level, point in zip(own, grid, strict=True) if point.is_baseline]
        found = [i for i, level in enumerate(levels) if level in baselines]
    return found[0] if concerned and len(found) == 1 else 0
