"""Compression, after a task of the MAD suite (Poli et al., 2024, arXiv 2403.17844, appendix B), for a language model.

Random tokens end with a compression token; behind it a query for each position asks which token stood there. No answer
is ever fed back, so what a recurrent layer can answer with is what it has kept in its state.

In the suite the last layer's vector at the compression token, plus a sine embedding of a position, goes through an MLP
of two layers that gives the token of that position. Here a query token of its own takes the place of the embedding, and
the model itself that of the MLP. So the bottleneck is another: not one vector of `dim` numbers but the states of all
layers, and softmax layers have none, unless their window is shorter than the distance to the token, since they can look
back at the tokens themselves. Compare recurrent layers by it.

An example of nine tokens, worked by hand. 3 symbols are 0 … 2, 3 is the compression token (c), and 4 … 7 are queries
for 4 positions. The tokens drawn are 2, 0, 0 and 1:

    position   0  1  2  3  4  5  6  7  8
    inputs     2  0  0  1  c  4  5  6  7
    targets    ·  ·  ·  ·  ·  2  0  0  1       · is −100: no loss, no metric
"""

from __future__ import annotations

import numpy as np

from gla_ablate.data.drawn import BLOCK, MOST_WORDS, DrawnSource, Split, ignored
from gla_ablate.data.source import DATA, require


@DATA.register("compression")
class Compression(DrawnSource):
    """n = (seq_len − 1) / 2, rounded down, tokens drawn with replacement from [0, symbols); the compression token,
    which is `symbols`; a query for each position i, which is symbols + 1 + i. The target at a query is the token at its
    position. An even `seq_len` ends with one more compression token.

    The vocabulary, symbols + 1 + n words, grows with `seq_len`: a model can't be tried at another length. The defaults
    are the suite's baseline: a vocabulary of 16 with the compression token, and 31 tokens. One at a time it goes on to
    128 words, 255 tokens, and 800 training examples.
    """

    name = "compression"

    def __init__(
        self,
        *,
        seq_len: int = 64,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        symbols: int = 15,
        train_examples: int = 12_800,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        require(symbols >= 2, "symbols", symbols, "at least 2")
        require(symbols <= MOST_WORDS, "symbols", symbols, f"at most {MOST_WORDS}")
        require(seq_len >= 3, "seq_len", seq_len, "at least 3, for a token, the compression token and a query")
        self.symbols = symbols
        self.compressed = (seq_len - 1) // 2  # tokens
        self.vocab_size = symbols + 1 + self.compressed
        self.labelled_share = self.compressed / seq_len

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        n = self.compressed
        tokens = rng.integers(self.symbols, size=(BLOCK, n))
        inputs = np.full((BLOCK, self.seq_len), self.symbols)
        inputs[:, :n] = tokens
        inputs[:, n + 1 : 2 * n + 1] = self.symbols + 1 + np.arange(n)
        targets = ignored(inputs.shape)
        targets[:, n + 1 : 2 * n + 1] = tokens
        return inputs, targets
