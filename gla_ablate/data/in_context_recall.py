"""In-context recall, a task of the MAD suite (Poli et al., 2024, arXiv 2403.17844, appendix B).

Keys and values take turns. Which value a key has is drawn anew for each sequence and holds throughout it: from the
second time that a key comes up, the model can know what follows. Unlike in MQAR (`mqar.py`) keys come up at any time
and as often as they are drawn, and two of them may have the same value.

An example of ten tokens, worked by hand. Vocabulary 8: keys are 0 … 3, values 4 … 7. In this sequence 2 has the value
5, 0 has 7, 3 has 5; the keys drawn are 2, 0, 2, 3, and the last, one of those that have come up, is 0:

    position   0  1  2  3  4  5  6  7  8  9
    inputs     2  5  0  7  2  5  3  5  0  7
    targets    ·  ·  ·  ·  5  ·  ·  ·  7  ·       · is −100: no loss, no metric
"""

from __future__ import annotations

import numpy as np

from gla_ablate.data.drawn import BLOCK, DrawnSource, Split, ignored, require_words
from gla_ablate.data.source import DATA, require


@DATA.register("in_context_recall")
class InContextRecall(DrawnSource):
    """Keys drawn with replacement from [0, V/2), each with a value drawn with replacement from [V/2, V); V is
    `vocab_size`. The last key is one that has come up before, all of which are equally likely. The target at a key that
    has come up before is its value. An odd `seq_len` ends with a key.

    Who guesses blindly is right once in V/2 times; who knows the values that have come up, but not of which keys, more
    often, and the more so the fewer keys there are.

    The defaults are the suite's baseline (`multi_query`). One at a time it goes on to a vocabulary of 128, 1024
    positions, and 800 training examples. The suite trains on all next tokens, of which none but these can be known, and
    tests on these; here both are on these.
    """

    name = "in_context_recall"

    def __init__(
        self,
        *,
        seq_len: int = 128,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        vocab_size: int = 16,
        train_examples: int = 12_800,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        require_words(vocab_size, 4, "two keys and two values")
        require(seq_len >= 3, "seq_len", seq_len, "at least 3, for a pair and a key that is asked again")
        self.vocab_size = vocab_size
        self.labelled_share = labelled_share(seq_len, keys=vocab_size // 2)

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        half = self.vocab_size // 2
        return draw_recall(rng, self.seq_len, keys=half, values=self.vocab_size - half)


def draw_recall(
    rng: np.random.Generator, seq_len: int, *, keys: int, values: int, noise_words: int = 0, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """`BLOCK` examples, [BLOCK, seq_len], whose vocabulary is keys, then values, then words for noise.

    With probability `noise` the place of a pair holds two words of noise; but never the last place, nor one other.
    """
    places = -(-seq_len // 2)
    key = rng.integers(keys, size=(BLOCK, places))  # [BLOCK, places]
    noisy = rng.random((BLOCK, places)) < noise
    noisy[np.arange(BLOCK), rng.integers(places - 1, size=BLOCK)] = False
    noisy[:, -1] = False

    row, place = np.nonzero(~noisy[:, :-1])
    first = np.full((BLOCK, keys), places)  # the place at which a key first comes up, `places` for never
    np.minimum.at(first, (row, key[row, place]), place)
    key[:, -1] = np.where(first < places, rng.random(first.shape), -1).argmax(1)

    value = np.take_along_axis(rng.integers(keys, keys + values, size=(BLOCK, keys)), key, axis=1)
    known = ~noisy & (np.take_along_axis(first, key, axis=1) < np.arange(places))
    if noise_words:
        key[noisy], value[noisy] = rng.integers(keys + values, keys + values + noise_words, size=(2, noisy.sum()))
    inputs = np.stack([key, value], axis=2).reshape(BLOCK, 2 * places)
    targets = ignored(inputs.shape)
    targets[:, ::2][known] = value[known]
    return inputs[:, :seq_len], targets[:, :seq_len]


def labelled_share(seq_len: int, keys: int, noise: float = 0.0) -> float:
    """The expected share of positions that `draw_recall` labels: of N pairs before the last all but the first of each
    key, N − keys · (1 − (1 − 1/keys)^N) of them on average, and the last. N is 1 + a binomial variable."""
    others = -(-seq_len // 2) - 2  # places that may be noise
    pairs = 1 + others * (1 - noise)
    unseen = (1 - 1 / keys) * (1 - (1 - noise) / keys) ** others  # the mean of (1 − 1/keys)^N
    return (pairs - keys * (1 - unseen) + 1) / seq_len
