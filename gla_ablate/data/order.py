"""Which rows make up training batch number `step`: a function of (seed, step) and nothing else.

An epoch is a permutation of all rows, keyed by (seed, epoch), cut into whole batches; the few rows left over change
from epoch to epoch. Workers, restarts and the model have no say in it, so trials of one seed see the same batches in
the same order, and a run resumed at step n reads what it would have read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


class Shares(Sampler[list[int]]):
    """Of each batch the rows of process `rank` of `world`, one behind the other; all have equally many or, of rows that
    don't divide, some one more."""

    def __init__(self, batches: Sampler[list[int]], rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            # rounded up, so that the first ranks have what there is
            begin, end = (-(-len(batch) * rank // self.world) for rank in (self.rank, self.rank + 1))
            yield batch[begin:end]


class StepBatches(Sampler[list[int]]):
    """Endless batches of row numbers, from that of `start_step` on. `rows` must fill one batch."""

    def __init__(self, rows: int, batch_size: int, seed: int, start_step: int = 0) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step

    def batch(self, step: int) -> list[int]:
        """The `batch_size` row numbers of step `step`, counted from 0."""
        epoch, position = divmod(step, self.rows // self.batch_size)
        start = position * self.batch_size
        return epoch_order(self.rows, self.seed, epoch)[start : start + self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, itertools.count(self.start_step))


@lru_cache(maxsize=1)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `range(rows)` of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
