"""How well a task is solved in each of the settings that are validated together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SettingAccuracy(Metric):
    """The share of right answers in each of the `names`, over the targets of one validation."""

    counts: Tensor  # [names, 2]: right answers and all

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.add_state("counts", torch.zeros(len(names), 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, batch: dict[str, Any], correct: Tensor) -> None:
        """`correct` [N]: of the targets of `batch` that count, in order, whether the answer was right."""
        settings = batch["setting"].repeat_interleave(batch["targets"].shape[1])  # [B·T]
        if "labelled" in batch:
            settings = settings[batch["labelled"]]
        self.counts.index_add_(0, settings, torch.stack([correct, torch.ones_like(correct)], 1).long())

    def compute(self) -> dict[str, float]:
        """By the tag that it is logged under."""
        return {
            f"val/accuracy/{name}": n / total for name, (n, total) in zip(self.names, self.counts.tolist(), strict=True)
        }
