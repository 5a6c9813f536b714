"""Memorization, a task of the MAD suite (Poli et al., 2024, arXiv 2403.17844, appendix B).

A fixed dictionary gives every key a value of its own. It is the same in all sequences and stands in none of them: the
model learns it in its weights, and needs no state but to see, at the insert token, which key came before.

An example of six tokens, worked by hand. Vocabulary 9: keys are 0 … 3, values 4 … 7, 8 is the insert token (i). The
dictionary is 0 → 4, 1 → 7, 2 → 5, 3 → 6, and the keys drawn are 2, 0 and 3:

    position   0  1  2  3  4  5
    inputs     2  i  0  i  3  i
    targets    ·  5  ·  4  ·  6       · is −100: no loss, no metric
"""

from __future__ import annotations

import numpy as np

from gla_ablate.data.drawn import BLOCK, TASK_SEED, DrawnSource, Split, ignored, require_words
from gla_ablate.data.source import DATA, require

DICTIONARY = 2  # second word of the dictionary's random seed, where a split's stands


@DATA.register("memorization")
class Memorization(DrawnSource):
    """Keys are [0, K), with K = (V − 1) / 2 rounded down, and values [K, V − 1); V is `vocab_size`, and its last word
    the insert token. Two keys have two values. In a block of 256 examples the keys are
    one permutation of all of them after another, so that each comes up equally often, and all of them in training. An
    odd `seq_len` ends with a key that isn't asked.

    The defaults are the suite's baseline, but for the keys, which it draws independently; it goes on to a vocabulary of
    8192, about as many words as 256 examples of 32 tokens can teach.
    """

    name = "memorization"

    def __init__(
        self,
        *,
        seq_len: int = 32,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        vocab_size: int = 256,
        train_examples: int = 256,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        require_words(vocab_size, 5, "two keys, two values and the insert token")
        require(seq_len >= 2, "seq_len", seq_len, "at least 2, for a key and the insert token")
        self.keys = (vocab_size - 1) // 2
        self.asked = seq_len // 2  # keys of a sequence
        least = -(-self.keys // BLOCK)  # keys that every example of a block has to ask
        require(
            self.asked >= least, "seq_len", seq_len, f"at least {2 * least}, for {self.keys} keys in {BLOCK} examples"
        )
        least = -(-self.keys // self.asked)
        require(train_examples >= least, "train_examples", train_examples, f"at least {least}, for {self.keys} keys")
        self.vocab_size = vocab_size
        self.labelled_share = self.asked / seq_len

    @property
    def dictionary(self) -> np.ndarray:
        """The value of each key, [K]."""
        return np.random.default_rng([TASK_SEED, DICTIONARY]).permutation(np.arange(self.keys, self.vocab_size - 1))[
            : self.keys
        ]

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        rounds = -(-BLOCK * self.asked // self.keys)
        drawn = rng.permuted(np.tile(np.arange(self.keys), (rounds, 1)), axis=1)
        keys = drawn.reshape(-1)[: BLOCK * self.asked].reshape(BLOCK, self.asked)
        inputs = np.full((BLOCK, self.seq_len), self.vocab_size - 1)
        inputs[:, 0 : 2 * self.asked : 2] = keys
        if self.seq_len % 2:
            inputs[:, -1] = rng.integers(self.keys, size=BLOCK)
        targets = ignored(inputs.shape)
        targets[:, 1::2] = self.dictionary[keys]
        return inputs, targets
