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

import math
from typing import NamedTuple

import numpy as np

from gla_ablate.data.drawn import BLOCK, DrawnSource, Examples, Split, draw_to_front, ignored, require_words
from gla_ablate.data.source import DATA, require

FILL = 0  # behind an example that is shorter than its row


class Setting(NamedTuple):
    """How long an example is, and how many pairs it has."""

    length: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.pairs}_pairs_in_{self.length}"


@DATA.register("mqar")
class Mqar(DrawnSource):
    """`pairs` keys drawn from [1, V/2) and as many values from [V/2, V), both without replacement; V is `vocab_size`.

    Key j is asked again at position 2 · pairs + 2 · gap_j. The gaps are drawn without replacement from 0, 1, … with
    probability ∝ (gap + 1)^(power − 1): the smaller `power`, the nearer the queries; 1 is uniform. The target at a
    query is the key's value. All other positions behind the context hold tokens drawn from everything but 0 and the
    keys of the sequence, so that a key stands in its sequence exactly twice.

    A list of `pairs` makes a mixture, of the lengths that `lengths` lists beside it or all of `seq_len` tokens:
    examples take turns among these settings, so that one listed twice comes up twice as often. Behind an example that
    is shorter than `seq_len` stand zeros, which a causal model doesn't see. `val_pairs` and `val_lengths` list others
    for validation, whose rows are as long as the longest of them. It logs the accuracy of each setting, such as
    val/accuracy/64_pairs_in_256; val/accuracy is over all queries, of which most are those of the largest setting.
    """

    name = "mqar"

    def __init__(
        self,
        *,
        seq_len: int = 64,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        vocab_size: int = 8192,
        pairs: int | list[int] = 4,
        lengths: list[int] | None = None,
        val_pairs: int | list[int] | None = None,
        val_lengths: list[int] | None = None,
        power: float = 0.01,
        train_examples: int = 100_000,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        train = settings(pairs, lengths, seq_len)
        longest = max(setting.length for setting in train)
        require(seq_len >= longest, "seq_len", seq_len, f"at least {longest}, the longest of lengths")
        if val_pairs is None:
            require(val_lengths is None, "val_lengths", val_lengths, "null without val_pairs")
            val, longest = train, seq_len
        else:
            val = settings(val_pairs, val_lengths, seq_len, "val_")
            longest = max(setting.length for setting in val)
        val = list(dict.fromkeys(val))  # each once, however much it weighs in training
        most = max(setting.pairs for setting in train + val)
        require_words(vocab_size, 2 * most + 2, f"{most} different keys")
        require(0 < power < math.inf, "power", power, "a number above 0")
        least = len(val) * longest
        require(val_tokens >= least, "val_tokens", val_tokens, f"at least {least}, for {len(val)} rows of {longest}")
        self.vocab_size = vocab_size
        self.power = power
        self.settings: dict[Split, list[Setting]] = {"train": train, "val": val}
        self.row_len: dict[Split, int] = {"train": seq_len, "val": longest}
        self.val_rows = val_tokens // longest
        self.val_settings = tuple(map(str, val)) if len(val) > 1 else ()
        labelled = sum(len(turns) * setting.pairs for turns, setting in self._turns("train"))
        self.labelled_share = labelled / (BLOCK * seq_len)

    def check_longer(self, multiple: int) -> None:
        super().check_longer(multiple)
        for name in ("lengths", "val_lengths"):
            given = self._options.get(name)
            require(given is None, name, given, "null where eval.lengths say how long validation rows are")

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.full((BLOCK, self.row_len[split]), FILL, dtype=np.int32)
        targets = ignored(inputs.shape)
        for turns, (length, pairs) in self._turns(split):
            own = np.s_[turns.start :: turns.step, :length]
            inputs[own], targets[own] = draw_examples(
                rng, len(turns), seq_len=length, vocab_size=self.vocab_size, pairs=pairs, power=self.power
            )
        return inputs, targets

    def _draw(self, split: Split, count: int) -> Examples:
        examples = super()._draw(split, count)
        if split == "val" and self.val_settings:
            examples.settings = np.arange(count) % BLOCK % len(self.val_settings)
        return examples

    def _turns(self, split: Split) -> list[tuple[range, Setting]]:
        """Each setting with the numbers of its examples in a block."""
        own = self.settings[split]
        return [(range(i, BLOCK, len(own)), setting) for i, setting in enumerate(own)]


def settings(pairs: int | list[int], lengths: list[int] | None, seq_len: int, prefix: str = "") -> list[Setting]:
    """What the options `pairs` and `lengths`, whose names have that prefix, say. Raises `ConfigError`."""
    counts = pairs if isinstance(pairs, list) else [pairs]
    require(1 <= len(counts) <= BLOCK, f"{prefix}pairs", counts, f"from 1 to {BLOCK} numbers")
    key = "seq_len" if lengths is None else f"{prefix}lengths"
    lengths = [seq_len] * len(counts) if lengths is None else lengths
    require(len(lengths) == len(counts), key, lengths, f"as many as {prefix}pairs, {len(counts)}")
    for length, count in zip(lengths, counts, strict=True):
        require(count >= 1, f"{prefix}pairs", pairs, "at least 1")
        least = 4 * count
        require(length >= least, key, length, f"at least {least}, for {count} pairs and as many queries")
    return [Setting(length, count) for length, count in zip(lengths, counts, strict=True)]


def draw_examples(
    rng: np.random.Generator, count: int, *, seq_len: int, vocab_size: int, pairs: int, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """`count` examples: inputs and targets, int32 [count, seq_len]."""
    half, context = vocab_size // 2, 2 * pairs
    tokens = np.tile(np.arange(1, vocab_size, dtype=np.int32), (count, 1))  # keys 1 … V/2 − 1, then the values
    draw_to_front(rng, tokens[:, : half - 1], pairs)
    keys, fill = tokens[:, :pairs], tokens[:, pairs:]
    values = np.tile(np.arange(half, vocab_size, dtype=np.int32), (count, 1))
    draw_to_front(rng, values, pairs)
    values = values[:, :pairs]

    # Successive draws without replacement, weighted by w, are the order of log w + Gumbel noise (Yellott, 1977).
    gaps = np.arange((seq_len - context) // 2)
    noise = rng.gumbel(size=(count, len(gaps)))
    order = np.argsort(-((power - 1) * np.log(gaps + 1) + noise), axis=1)
    queries = context + 2 * order[:, :pairs]  # positions [count, pairs]

    inputs = np.take_along_axis(fill, rng.integers(fill.shape[1], size=(count, seq_len)), axis=1)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    np.put_along_axis(inputs, queries, keys, axis=1)
    targets = ignored((count, seq_len))
    np.put_along_axis(targets, queries, values, axis=1)
    return inputs, targets
