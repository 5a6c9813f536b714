"""Tasks whose examples are drawn, not read: what the synthetic sources have in common.

A process draws its examples itself, in blocks of 256. Example i depends on its block and its split alone: not on the
trial's seed, so that all trials share the task, and not on how many examples there are.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gla_ablate.data.source import IGNORED, DataSource, Rows, require

Split = Literal["train", "val"]

BLOCK = 256  # examples drawn at once
TASK_SEED = 20231208  # first word of a block's random seed
STREAM: dict[Split, int] = {"train": 0, "val": 1}  # the second; the third is the block
MOST_WORDS = 2**20  # of a vocabulary, of which `BLOCK` examples may be drawn as a table
MOST_TOKENS = 2**31  # of a split: 16 GiB with their targets


class DrawnSource(DataSource):
    """A task. A subclass sets `name`, that it is registered under, `vocab_size` and `labelled_share`, and draws."""

    name: str
    bytes_per_token = None

    def __init__(self, seq_len: int, batch_size: int, val_tokens: int, train_examples: int) -> None:
        super().__init__(seq_len, batch_size, val_tokens)
        require(train_examples >= batch_size, "train_examples", train_examples, f"at least one batch of {batch_size}")
        most = MOST_TOKENS // seq_len
        require(train_examples <= most, "train_examples", train_examples, f"at most {most} of {seq_len} tokens")
        require(val_tokens <= MOST_TOKENS, "val_tokens", val_tokens, f"at most {MOST_TOKENS}")
        self.train_examples = train_examples

    @abstractmethod
    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """A block of examples: inputs and targets, integers [BLOCK, seq_len]."""

    def prepare(self) -> None:
        """Nothing: a process draws the examples itself, in about a second."""

    @cached_property
    def train(self) -> Examples:
        return self._draw("train", self.train_examples)

    @cached_property
    def val(self) -> Examples:
        return self._draw("val", self.val_rows)

    def stamp(self) -> dict[str, Any]:
        arrays = [self.train.inputs, self.train.targets, self.val.inputs, self.val.targets]
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array.tobytes())
        return {
            "name": self.name,
            "bytes": sum(array.nbytes for array in arrays),
            "sha256": digest.hexdigest(),
            "train_examples": len(self.train),
            "val_examples": len(self.val),
        }

    def _draw(self, split: Split, count: int) -> Examples:
        parts = [self._block(split, block) for block in range(-(-count // BLOCK))]
        inputs, targets = (np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))
        return Examples(inputs, targets)

    def _block(self, split: Split, block: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = self.draw(np.random.default_rng([TASK_SEED, STREAM[split], block]), split)
        return inputs.astype(np.int32, copy=False), targets.astype(np.int32, copy=False)


class Examples(Rows):
    """Examples in memory, inputs and targets int32 [N, seq_len]. With `settings`, int64 [N], the number in
    `DataSource.val_settings` of the one that a row is of, batches have it too, as "setting"."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, settings: np.ndarray | None = None) -> None:
        self.inputs = inputs
        self.targets = targets
        self.settings = settings

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: int | list[int]) -> dict[str, Tensor]:
        batch = {
            "inputs": torch.from_numpy(self.inputs[rows].astype(np.int64)),
            "targets": torch.from_numpy(self.targets[rows].astype(np.int64)),
        }
        if self.settings is not None:
            batch["setting"] = torch.as_tensor(self.settings[rows])
        return batch


def require_words(vocab_size: int, least: int, what: str) -> None:
    """Raise `ConfigError` unless a vocabulary has `least` words or more, which are for `what`, and not too many."""
    require(vocab_size >= least, "vocab_size", vocab_size, f"at least {least}, for {what}")
    require(vocab_size <= MOST_WORDS, "vocab_size", vocab_size, f"at most {MOST_WORDS}")


def ignored(shape: tuple[int, ...]) -> np.ndarray:
    """Targets of which none counts yet."""
    return np.full(shape, IGNORED, dtype=np.int32)


def draw_to_front(rng: np.random.Generator, tokens: np.ndarray, count: int) -> None:
    """Swap `count` tokens of each row of [N, M], drawn without replacement, into its first columns.

    Fisher–Yates, stopped early: shuffling whole rows takes ten times as long at the usual vocabulary of 8192.
    """
    every = np.arange(len(tokens))
    for column in range(count):
        drawn = rng.integers(column, tokens.shape[1], size=len(tokens))
        tokens[every, column], tokens[every, drawn] = tokens[every, drawn], tokens[every, column]
