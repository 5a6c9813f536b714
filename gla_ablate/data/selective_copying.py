"""Selective copying, a task of the MAD suite (Poli et al., 2024, arXiv 2403.17844, appendix B).

Tokens are scattered among blanks; after a copy token the model gives them in their order. It has to keep what matters
at times that only the tokens themselves tell, and to pass over the rest, which is what a gate that reads them is for.

An example of twelve tokens, worked by hand. Vocabulary 6: tokens are 0 … 3, 4 is the blank (_), 5 the copy token (c).
Three tokens, 2, 0 and 2, are to be copied; 12 − 3 − 1 = 8 positions come before the copy token. They draw 1, 4 and 6:

    position   0  1  2  3  4  5  6  7  8  9 10 11
    inputs     _  2  _  _  0  _  2  _  c  _  _  _
    targets    ·  ·  ·  ·  ·  ·  ·  ·  ·  2  0  2       · is −100: no loss, no metric
"""

from __future__ import annotations

import numpy as np

from gla_ablate.data.drawn import BLOCK, DrawnSource, Split, draw_to_front, ignored, require_words
from gla_ablate.data.source import DATA, require


@DATA.register("selective_copying")
class SelectiveCopying(DrawnSource):
    """`copied` tokens, drawn with replacement, at as many of the first seq_len − copied − 1 positions, drawn without;
    then the copy token and `copied` blanks, where the targets are. Of V = `vocab_size` words the blank and the copy
    token are the last two.

    The defaults are the suite's baseline. One at a time it goes on to a vocabulary of 128, 1024 positions, 96 tokens to
    copy, and 800 training examples. There all blanks stand before the last token to be copied; here the positions are
    uniform.
    """

    name = "selective_copying"

    def __init__(
        self,
        *,
        seq_len: int = 256,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        vocab_size: int = 16,
        copied: int = 16,
        train_examples: int = 12_800,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        require(copied >= 1, "copied", copied, "at least 1")
        require_words(vocab_size, 4, "two tokens, the blank and the copy token")
        least = 2 * copied + 1
        require(
            seq_len >= least,
            "seq_len",
            seq_len,
            f"at least {least}, for {copied} tokens, the copy token, {copied} copies",
        )
        self.vocab_size = vocab_size
        self.copied = copied
        self.labelled_share = copied / seq_len

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        blank, copy = self.vocab_size - 2, self.vocab_size - 1
        before = self.seq_len - self.copied - 1  # positions before the copy token
        tokens = rng.integers(blank, size=(BLOCK, self.copied))
        positions = np.tile(np.arange(before), (BLOCK, 1))
        draw_to_front(rng, positions, self.copied)
        inputs = np.full((BLOCK, self.seq_len), blank)
        np.put_along_axis(inputs, np.sort(positions[:, : self.copied]), tokens, axis=1)
        inputs[:, before] = copy
        targets = ignored(inputs.shape)
        targets[:, before + 1 :] = tokens
        return inputs, targets
