"""Induction heads, a task of Fu et al. (*Hungry Hungry Hippos*, 2022, arXiv 2212.14052, section 3.1), in the form that
*Mamba* (Gu & Dao, 2023, arXiv 2312.00752, section 4.1.2) extrapolates with.

A special token stands once among random ones, and again at the end: the model gives what followed it the first time.
All that has to be kept is one token, for as long as the sequence is.

An example of eight tokens, worked by hand. Vocabulary 5: tokens are 0 … 3, 4 is the special one (s), which draws
position 2:

    position   0  1  2  3  4  5  6  7
    inputs     3  0  s  1  1  3  0  s
    targets    ·  ·  ·  ·  ·  ·  ·  1       · is −100: no loss, no metric
"""

from __future__ import annotations

import numpy as np

from gla_ablate.data.drawn import BLOCK, DrawnSource, Split, ignored, require_words
from gla_ablate.data.source import DATA, require


@DATA.register("induction_heads")
class InductionHeads(DrawnSource):
    """Tokens drawn with replacement from [0, V − 1), V being `vocab_size`; V − 1 is the special token, at a position
    drawn from 0 … seq_len − 3 and at the last. One target a sequence: the token behind its first.

    The defaults are Mamba's, which draws new examples all the time and tests at lengths up to 2^20; in Fu et al. the
    vocabulary is 20 and a sequence has 30 tokens.
    """

    name = "induction_heads"

    def __init__(
        self,
        *,
        seq_len: int = 256,
        batch_size: int = 64,
        val_tokens: int = 262_144,
        vocab_size: int = 16,
        train_examples: int = 50_000,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        require_words(vocab_size, 3, "two tokens and the special one")
        require(seq_len >= 3, "seq_len", seq_len, "at least 3, for the special token twice and one between")
        self.vocab_size = vocab_size
        self.labelled_share = 1 / seq_len

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        every = np.arange(BLOCK)
        inputs = rng.integers(self.vocab_size - 1, size=(BLOCK, self.seq_len))
        special = rng.integers(self.seq_len - 2, size=BLOCK)  # its position
        inputs[every, special] = inputs[:, -1] = self.vocab_size - 1
        targets = ignored(inputs.shape)
        targets[:, -1] = inputs[every, special + 1]
        return inputs, targets
