"""Multi-query associative recall, the synthetic task of *Zoology* (Arora et al., 2023, arXiv 2312.04927).

A sequence lists key-value pairs, then asks for each key once; the model answers with its value. How many pairs a model
can hold is a matter of its recurrent state, which makes the task a test of state size and gating.

An example of ten tokens, worked by hand. Vocabulary 12: keys are 1 … 5, values 6 … 11. Two pairs, (3, 8) and (5, 6),
make a context of 4 positions, and 3 gaps fit behind it. Key 3 draws gap 0 and key 5 gap 2, so the queries stand at
4 + 2 · 0 and 4 + 2 · 2. The other positions behind the context, marked *, get random tokens but not 0, 3 or 5:

    position   0  1  2  3   4  5   6  7   8  9
    inputs     3  8  5  6   3  2*  9* 6*  5  11*
    targets    ·  ·  ·  ·   8  ·   ·  ·   6  ·       · is −100: no loss, no metric
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gla_ablate.data.source import DATA, IGNORED, DataSource, Rows, require

BLOCK = 256  # examples drawn at once; example i depends on its block and split alone, never on how many there are
TASK_SEED = 20231208  # first word of a block's random seed: fixed, so that all trials share the task
MOST = 2**20  # words of the vocabulary, of which `BLOCK` examples are drawn as a table
STREAM = {"train": 0, "val": 1}  # the second


@DATA.register("mqar")
class Mqar(DataSource):
    """`pairs` keys drawn from [1, V/2) and as many values from [V/2, V), both without replacement; V is `vocab_size`.

    Key j is asked again at position 2 · pairs + 2 · gap_j. The gaps are drawn without replacement from 0, 1, … with
    probability ∝ (gap + 1)^(power − 1): the smaller `power`, the nearer the queries; 1 is uniform. The target at a
    query is the key's value. All other positions behind the context hold tokens drawn from everything but 0 and the
    keys of the sequence, so that a key stands in its sequence exactly twice.
    """

    bytes_per_token = None

    def __init__(
        self,
        *,
        seq_len: int = 64,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        vocab_size: int = 8192,
        pairs: int = 4,
        power: float = 0.01,
        train_examples: int = 100_000,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens)
        require(pairs >= 1, "pairs", pairs, "at least 1")
        require(
            vocab_size // 2 > pairs, "vocab_size", vocab_size, f"at least {2 * pairs + 2}, for {pairs} different keys"
        )
        require(vocab_size <= MOST, "vocab_size", vocab_size, f"at most {MOST}")
        require(
            seq_len >= 4 * pairs, "seq_len", seq_len, f"at least {4 * pairs}, for {pairs} pairs and as many queries"
        )
        require(power > 0, "power", power, "a number above 0")
        require(train_examples >= batch_size, "train_examples", train_examples, f"at least one batch of {batch_size}")
        self.vocab_size = vocab_size
        self.pairs = pairs
        self.power = power
        self.train_examples = train_examples
        self.labelled_share = pairs / seq_len

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
            "name": "mqar",
            "bytes": sum(array.nbytes for array in arrays),
            "sha256": digest.hexdigest(),
            "train_examples": len(self.train),
            "val_examples": len(self.val),
        }

    def _draw(self, split: str, count: int) -> Examples:
        blocks = [
            draw_examples(
                np.random.default_rng([TASK_SEED, STREAM[split], block]),
                seq_len=self.seq_len,
                vocab_size=self.vocab_size,
                pairs=self.pairs,
                power=self.power,
            )
            for block in range(-(-count // BLOCK))
        ]
        inputs, targets = (np.concatenate(parts)[:count] for parts in zip(*blocks, strict=True))
        return Examples(inputs, targets)


class Examples(Rows):
    """Examples in memory, inputs and targets int32 [N, seq_len]."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: int | list[int]) -> dict[str, Tensor]:
        return {
            "inputs": torch.from_numpy(self.inputs[rows].astype(np.int64)),
            "targets": torch.from_numpy(self.targets[rows].astype(np.int64)),
        }


def draw_examples(
    rng: np.random.Generator, *, seq_len: int, vocab_size: int, pairs: int, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """`BLOCK` examples: inputs and targets, int32 [BLOCK, seq_len]."""
    half, context = vocab_size // 2, 2 * pairs
    tokens = np.tile(np.arange(1, vocab_size, dtype=np.int32), (BLOCK, 1))  # keys 1 … V/2 − 1, then the values
    draw_to_front(rng, tokens[:, : half - 1], pairs)
    keys, fill = tokens[:, :pairs], tokens[:, pairs:]
    values = np.tile(np.arange(half, vocab_size, dtype=np.int32), (BLOCK, 1))
    draw_to_front(rng, values, pairs)
    values = values[:, :pairs]

    # Successive draws without replacement, weighted by w, are the order of log w + Gumbel noise (Yellott, 1977).
    gaps = np.arange((seq_len - context) // 2)
    noise = rng.gumbel(size=(BLOCK, len(gaps)))
    order = np.argsort(-((power - 1) * np.log(gaps + 1) + noise), axis=1)
    queries = context + 2 * order[:, :pairs]  # positions [BLOCK, pairs]

    inputs = np.take_along_axis(fill, rng.integers(fill.shape[1], size=(BLOCK, seq_len)), axis=1)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    np.put_along_axis(inputs, queries, keys, axis=1)
    targets = np.full((BLOCK, seq_len), IGNORED, dtype=np.int32)
    np.put_along_axis(targets, queries, values, axis=1)
    return inputs, targets


def draw_to_front(rng: np.random.Generator, tokens: np.ndarray, count: int) -> None:
    """Swap `count` tokens of each row of [N, M], drawn without replacement, into its first columns.

    Fisher–Yates, stopped early: shuffling whole rows takes ten times as long at the usual vocabulary of 8192.
    """
    every = np.arange(len(tokens))
    for column in range(count):
        drawn = rng.integers(column, tokens.shape[1], size=len(tokens))
        tokens[every, column], tokens[every, drawn] = tokens[every, drawn], tokens[every, column]
