"""Noisy in-context recall, a task of the MAD suite (Poli et al., 2024, arXiv 2403.17844, appendix B): in-context recall
(`in_context_recall.py`) with noise from words of its own between the pairs, which the model must learn to pass over.

An example of ten tokens, worked by hand. Vocabulary 10, the last 2 words of which are for noise: keys are 0 … 3, values
4 … 7, noise 8 and 9. In this sequence 2 has the value 5 and 3 has 4. The third of five places is noise:

    position   0  1  2  3  4  5  6  7  8  9
    inputs     2  5  3  4  9  8  3  4  2  5
    targets    ·  ·  ·  ·  ·  ·  4  ·  5  ·       · is −100: no loss, no metric
"""

from __future__ import annotations

import numpy as np

from gla_ablate.data.drawn import DrawnSource, Split, require_words
from gla_ablate.data.in_context_recall import draw_recall, labelled_share
from gla_ablate.data.source import DATA, require


@DATA.register("noisy_recall")
class NoisyRecall(DrawnSource):
    """In-context recall in which the place of a pair holds two words of noise with probability `noise`. The last place
    and one other, which is drawn, always hold a pair. Of V = `vocab_size` words the last `noise_words` are for noise;
    the others are keys and values, half each.

    The defaults are the suite's baseline. One at a time it goes on to a vocabulary of 144, 1024 positions, `noise` 0.8,
    and 800 training examples.
    """

    name = "noisy_recall"

    def __init__(
        self,
        *,
        seq_len: int = 128,
        batch_size: int = 64,
        val_tokens: int = 65_536,
        vocab_size: int = 32,
        noise_words: int = 16,
        noise: float = 0.2,
        train_examples: int = 12_800,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens, train_examples)
        require(noise_words >= 1, "noise_words", noise_words, "at least 1")
        require(0 <= noise < 1, "noise", noise, "a fraction from 0 to below 1")
        require_words(vocab_size, 4 + noise_words, f"two keys, two values and {noise_words} words of noise")
        require(seq_len >= 3, "seq_len", seq_len, "at least 3, for a pair and a key that is asked again")
        self.vocab_size = vocab_size
        self.noise_words = noise_words
        self.noise = noise
        self.keys = (vocab_size - noise_words) // 2
        self.labelled_share = labelled_share(seq_len, self.keys, noise)

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[np.ndarray, np.ndarray]:
        values = self.vocab_size - self.noise_words - self.keys
        return draw_recall(
            rng, self.seq_len, keys=self.keys, values=values, noise_words=self.noise_words, noise=self.noise
        )
