"""Fuzzy in-context recall, a task of the MAD suite (Poli et al., 2024, arXiv 2403.17844, appendix B): in-context recall
(`in_context_recall.py`) whose keys and values are of one or several tokens. What is to be bound lies further apart, and
the model has to see where a key ends.

An example of twelve tokens, worked by hand. Vocabulary 9: keys are made of 0 … 3, values of 4 … 7, and 8 fills up (f).
Both have one or two tokens. The pairs drawn are 1 → 5 7, then 1 2 → 5, then 0 → 5; a fourth could leave no room for the
last, which is one of them again, 1 → 5 7. They have 11 tokens. The last of these is no input any more, so 10 of the 12
positions are taken, and two are filled in front:

    position   0  1  2  3  4  5  6  7  8  9 10 11
    inputs     f  f  1  5  7  1  2  5  0  5  1  5
    targets    ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  5  7       · is −100: no loss, no metric
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from gla_ablate.data.drawn import BLOCK, DrawnSource, Split, ignored, require_words
from gla_ablate.data.source import DATA, IGNORED, require

MOST = 16  # tokens of a key or a value


@DATA.register("fuzzy_recall")
class FuzzyRecall(DrawnSource):
    """Keys of 1 to `key_tokens` tokens from [0, h) and values of 1 to `value_tokens` from [h, V − 1), with
    h = (V − 1) / 2 rounded down; V is `vocab_size`, and its last word fills up. All sizes are equally likely, and so
    are all tokens, but that none stands twice in a key or a value. A key that comes up again has the value that it had.
    There each token of the value is a target, and so it is in the pair at the end, one of those that have come up.
    In validation all keys have `key_tokens` tokens.

    The defaults are the suite's baseline (`multi_query`). One at a time it goes on to a vocabulary of 128, 1024
    positions, and 800 training examples. The suite trains on all next tokens; here training, too, is on those alone
    that can be known.
    """

    name = "fuzzy_recall"

    def __init__(
        self,
        *,
        seq_len: int = 128,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        vocab_size: int = 16,
        key_tokens: int = 3,
        value_tokens: int = 3,
        train_examples: int = 12_800,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        for key, tokens in (("key_tokens", key_tokens), ("value_tokens", value_tokens)):
            require(1 <= tokens <= MOST, key, tokens, f"from 1 to {MOST}")
        words = max(2, key_tokens, value_tokens)
        least = 2 * words + 1
        require_words(vocab_size, least, f"keys of {key_tokens} and values of {value_tokens} different tokens")
        least = 2 * (key_tokens + value_tokens) - 1
        require(
            seq_len >= least,
            "seq_len",
            seq_len,
            f"at least {least}, for two pairs of {key_tokens} + {value_tokens} tokens",
        )
        self.vocab_size = vocab_size
        self.key_tokens = key_tokens
        self.value_tokens = value_tokens

    @cached_property
    def labelled_share(self) -> float:  # type: ignore[override]  # read alone, as elsewhere the field
        """In training; measured on the first block."""
        _, targets = self._block("train", 0)
        return float((targets != IGNORED).mean())

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        every, half = np.arange(BLOCK), (self.vocab_size - 1) // 2
        room = self.seq_len + 1 - self.key_tokens - self.value_tokens  # for all pairs but the last
        least = self.key_tokens if split == "val" else 1
        key_sizes, keys = draw_motifs(rng, room // 2, least, self.key_tokens, 0, half)
        value_sizes, values = draw_motifs(rng, room // 2, 1, self.value_tokens, half, self.vocab_size - 1)
        first = first_alike(keys, half)  # [BLOCK, pairs], the pair at which a key first comes up
        value_sizes, values = np.take_along_axis(value_sizes, first, axis=1), values[every[:, None], first]
        known = first < np.arange(first.shape[1])

        ends = (key_sizes + value_sizes).cumsum(axis=1)
        fit = (ends <= room).sum(axis=1)  # pairs that there is room for, at least one
        asked = rng.integers(fit)
        last = fit[:, None]  # in place of the pair for which there was no room
        key_sizes, value_sizes, keys, values, ends, known = (
            np.concatenate([x, x[:, :1]], axis=1) for x in (key_sizes, value_sizes, keys, values, ends, known)
        )
        for x in (key_sizes, value_sizes, keys, values):
            x[every, fit] = x[every, asked]
        known[every, fit] = True
        ends[every, fit] = ends[every, fit - 1] + key_sizes[every, fit] + value_sizes[every, fit]

        used = np.arange(ends.shape[1]) <= last
        begins = ends - key_sizes - value_sizes + (self.seq_len + 1 - ends[every, fit])[:, None]
        stream = np.full((BLOCK, self.seq_len + 1), self.vocab_size - 1)
        answers = np.zeros(stream.shape, dtype=bool)
        for i in range(self.key_tokens):
            row, pair = np.nonzero(used & (i < key_sizes))
            stream[row, begins[row, pair] + i] = keys[row, pair, i]
        for i in range(self.value_tokens):
            row, pair = np.nonzero(used & (i < value_sizes))
            position = begins[row, pair] + key_sizes[row, pair] + i
            stream[row, position] = values[row, pair, i]
            answers[row, position] = known[row, pair]
        targets = ignored((BLOCK, self.seq_len))
        np.copyto(targets, stream[:, 1:], where=answers[:, 1:], casting="same_kind")
        return stream[:, :-1], targets


def draw_motifs(
    rng: np.random.Generator, pairs: int, least: int, most: int, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes from `least` to `most`, [BLOCK, pairs], and as many different tokens from [low, high) in each row of
    [BLOCK, pairs, most]; behind them −1."""
    sizes = rng.integers(least, most + 1, size=(BLOCK, pairs))
    tokens = np.empty((BLOCK, pairs, most), dtype=np.int64)
    for i in range(most):
        token = rng.integers(low, high - i, size=(BLOCK, pairs))  # the how manieth of those that are left
        for other in np.moveaxis(np.sort(tokens[..., :i], axis=2), 2, 0):
            token += token >= other
        tokens[..., i] = token
    tokens[np.arange(most) >= sizes[..., None]] = -1
    return sizes, tokens


def first_alike(motifs: np.ndarray, words: int) -> np.ndarray:
    """motifs [N, pairs, tokens], tokens from −1 to `words` − 1 → the first in its row that is the same, [N, pairs]."""
    rows, pairs, _ = motifs.shape
    code = np.repeat(np.arange(rows), pairs)
    for token in np.moveaxis(motifs.reshape(rows * pairs, -1), 1, 0):
        _, index, code = np.unique(code * (words + 1) + token + 1, return_index=True, return_inverse=True)
    return (index[code] % pairs).reshape(rows, pairs)
