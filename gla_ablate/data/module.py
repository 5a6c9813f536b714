"""A data source as Lightning takes it."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.utils.data import BatchSampler, Sampler, SequentialSampler

from gla_ablate.data.order import Shares, StepBatches
from gla_ablate.data.reading import Reader
from gla_ablate.data.source import IGNORED, Rows, build_source


class DataModule(lightning.LightningDataModule):
    """Batches `{"inputs", "targets"}`, int64 [batch_size, seq_len], of the source that a resolved `data:` part names;
    read ahead by a thread, see `reading.py`. `close` it in the end.

    Training batches have no end; the trainer's `max_steps` is where a run stops. Batch number `step` is decided by
    (seed, step), see `order.py`; the first is number `start_step`, which a checkpoint restores. Validation reads the
    same rows whatever the seed.

    Process `rank` of `world` gets its share of each batch. All have equally many batches: one that has no row of the
    last in validation gets a row of which no target counts, with the key "filler".
    """

    def __init__(
        self, config: dict[str, Any], seed: int, start_step: int = 0, accumulate: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        """`accumulate`: micro-batches that a process's share of a batch is given in."""
        super().__init__()
        self.source = build_source(config)
        self.seed = seed
        self.start_step = start_step
        self.accumulate = accumulate
        self.rank, self.world = rank, world
        self._train: Reader | None = None
        self._val: Reader | None = None
        self._longer: Reader | None = None

    def prepare_data(self) -> None:
        self.source.prepare()

    def train_dataloader(self) -> Reader:
        rows = self.source.train
        batches = StepBatches(len(rows), self.source.batch_size, self.seed, self.start_step)
        self._train = self._reader(rows, batches, self.accumulate)
        return self._train

    def val_dataloader(self) -> Reader:
        rows = self.source.val
        at_once = self.source.batch_size // self.accumulate
        self._val = self._reader(rows, BatchSampler(SequentialSampler(rows), at_once, drop_last=False))
        return self._val

    def longer_val_dataloader(self, multiple: int, longest: int) -> Reader:
        """As `val_dataloader`, rows `multiple` times as long, each process as many tokens at a time, or one row."""
        rows = self.source.longer_val(multiple, longest)
        at_once = max(self.source.batch_size // self.accumulate // multiple, self.world)
        self._longer = self._reader(rows, BatchSampler(SequentialSampler(rows), at_once, drop_last=False))
        return self._longer

    def _reader(self, rows: Rows, batches: Sampler[list[int]], parts: int = 1) -> Reader:
        if self.world > 1:
            rows, batches = Filled(rows), Shares(batches, self.rank, self.world)
        return Reader(rows, batches, parts)

    def waited(self) -> float:
        """Seconds that training batches have been waited for."""
        return 0.0 if self._train is None else self._train.waited

    def close(self) -> None:
        """End the threads that read."""
        for reader in (self._train, self._val, self._longer):
            if reader is not None:
                reader.close()

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None  # Lightning attaches itself before it asks
        # What is read ahead, and micro-batches, don't count: a checkpoint stands between two steps.
        return {"start_step": self.trainer.global_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start_step = state["start_step"]


class Filled(Rows):
    """`rows` with something to compute where a batch has none: where weights are shared out, all processes have to call
    the network equally often."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: int | list[int]) -> dict[str, Any]:
        if rows != []:
            return self.rows[rows]
        batch = self.rows[[0]]
        return {"inputs": batch["inputs"], "targets": torch.full_like(batch["targets"], IGNORED), "filler": True}
