"""A data source as Lightning takes it."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from gla_ablate.data.order import Shares, StepBatches
from gla_ablate.data.source import IGNORED, Rows, build_source


class DataModule(lightning.LightningDataModule):
    """Batches `{"inputs", "targets"}`, int64 [batch_size, seq_len], of the source that a resolved `data:` part names.

    Training batches have no end; the trainer's `max_steps` is where a run stops. Batch number `step` is decided by
    (seed, step), see `order.py`; the first is number `start_step`, which a checkpoint restores. Validation reads the
    same rows whatever the seed.

    Process `rank` of `world` gets its share of each batch. All have equally many batches: one that has no row of the
    last in validation gets a row of which no target counts, with the key "filler".
    """

    def __init__(
        self, config: dict[str, Any], seed: int, workers: int = 0, start_step: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__()
        self.source = build_source(config)
        self.seed = seed
        self.workers = workers
        self.start_step = start_step
        self.rank, self.world = rank, world

    def prepare_data(self) -> None:
        self.source.prepare()

    def train_dataloader(self) -> DataLoader:
        rows = self.source.train
        return self._loader(rows, StepBatches(len(rows), self.source.batch_size, self.seed, self.start_step))

    def val_dataloader(self) -> DataLoader:
        rows = self.source.val
        return self._loader(rows, BatchSampler(SequentialSampler(rows), self.source.batch_size, drop_last=False))

    def _loader(self, rows: Rows, batches: Sampler[list[int]]) -> DataLoader:
        if self.world > 1:
            rows, batches = Filled(rows), Shares(batches, self.rank, self.world)
        # The sampler's items are whole batches, which the rows read at once: batch_size=None leaves nothing to collate.
        return DataLoader(
            rows,
            batch_size=None,
            sampler=batches,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None  # Lightning attaches itself before it asks
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
