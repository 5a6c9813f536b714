"""Which trials make a comparison fair: those at the settings and seeds that all that is compared has.

Where a trial is missing, means over what is there would differ by the settings that they are over, and so would the
differences of two seeds. Of values of a factor (`members` here) a full block is kept instead, every member at every
setting of the other factors with every seed. What is kept depends on which trials count, never on their metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gla_ablate.report.labels import identity
from gla_ablate.report.points import Point


@dataclass(frozen=True)
class Trials:
    """The metric of a grid's trials by member, setting and seed."""

    values: np.ndarray  # [members, settings, seeds], NaN where no trial counts
    settings: list[dict[str, Any]]  # of the other factors, in grid order
    seeds: list[int]

    @property
    def counted(self) -> np.ndarray:
        """[members, settings, seeds], bool."""
        return ~np.isnan(self.values)


@dataclass(frozen=True)
class Block:
    """A full block: each of `members` has a trial at each of `settings` with each of `seeds` (bool arrays)."""

    members: np.ndarray
    settings: np.ndarray
    seeds: np.ndarray

    @property
    def size(self) -> int:
        """Trials of one member."""
        return int(self.settings.sum() * self.seeds.sum())

    def of(self, member: np.ndarray) -> np.ndarray:
        """What it holds of one member's [settings, seeds]."""
        return member[np.ix_(self.settings, self.seeds)]


def arranged(grid: Sequence[Point], member_of: Sequence[int | None], others: Sequence[str]) -> Trials:
    """`member_of` says for each point which member it is of, from 0, or None; `others` are the other factors."""
    seeds = sorted({trial.seed for point in grid for trial in point.trials})
    column = {seed: i for i, seed in enumerate(seeds)}
    rows: dict[str, int] = {}
    settings: list[dict[str, Any]] = []
    found: list[tuple[int, int, Point]] = []
    for point, member in zip(grid, member_of, strict=True):
        if member is None:
            continue
        setting = {factor: point.values.get(factor) for factor in others}
        row = rows.setdefault(identity(setting), len(rows))
        settings += [setting] * (row == len(settings))
        found.append((member, row, point))
    values = np.full((1 + max((member for member, *_ in found), default=-1), len(settings), len(seeds)), np.nan)
    for member, row, point in found:
        for seed, value in point.by_seed.items():
            values[member, row, column[seed]] = value
    return Trials(values, settings, seeds)


def balanced(counted: np.ndarray, anchor: int) -> Block:
    """The block of `counted` [members, settings, seeds] over which members are compared with each other.

    Members join the anchor, those that have most trials in common with it first; one that would leave less than half of
    what the anchor has stays apart.
    """
    shared = counted[anchor]
    settings, seeds = rectangle(shared)
    whole = Block(np.arange(len(counted)) == anchor, settings, seeds)
    block, members = whole, whole.members.copy()
    in_common = (counted & shared).sum(axis=(1, 2))
    for member in np.argsort(-in_common, kind="stable"):
        both = shared & counted[member]
        joined = block if in_common[member] and (both == shared).all() else Block(members, *rectangle(both))
        if joined.size and 2 * joined.size >= whole.size:
            members[member], shared, block = True, both, joined
    return Block(members, block.settings, block.seeds)


def pairwise(counted: np.ndarray, first: int, second: int) -> Block:
    """The block of two members alone."""
    members = np.isin(np.arange(len(counted)), (first, second))
    return Block(members, *rectangle(counted[first] & counted[second]))


def rectangle(counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(settings, seeds), bool, at which all of `counted` [settings, seeds] is true; none if nothing is.

    The setting or seed that lacks the largest share of its trials is left out until none is lacking; of equals a
    setting, for the interval hangs on the number of seeds, and the last one.
    """
    settings, seeds = (np.asarray(counted.any(axis=axis)) for axis in (1, 0))
    while not (part := counted[np.ix_(settings, seeds)]).all():
        by_setting, by_seed = 1 - part.mean(axis=1), 1 - part.mean(axis=0)
        lacking, left = (by_setting, settings) if by_setting.max() >= by_seed.max() else (by_seed, seeds)
        worst = np.flatnonzero(lacking == lacking.max())[-1]
        left[np.flatnonzero(left)[worst]] = False
    return settings, seeds
