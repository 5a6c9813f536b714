"""The language model: token embedding, blocks, final norm, output head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gla_ablate.config import ModelConfig
from gla_ablate.model.block import Block
from gla_ablate.model.embedding import Embedding
from gla_ablate.model.gates import Gate
from gla_ablate.model.initialise import initialise, seeded
from gla_ablate.model.recompute import Recompute, compiled_block, run_block
from gla_ablate.model.shapes import build_gates


class LanguageModel(nn.Module):
    """Next-token model: tokens [B,T] → logits [B,T,vocab]. Made by `build_model`.

    To decode, a prompt and then token by token, each call going on from the last:

        cache = model.new_cache(batch, length)
        logits = model(prompt, cache)[:, -1]
        logits = model(next_token, cache)[:, -1]  # next_token [B,1]
    """

    def __init__(self, config: ModelConfig, vocab_size: int, gates: list[Gate | None]) -> None:
        super().__init__()
        self.config = config
        # Without nn.Embedding's own draw: it is not needed, and on the meta device it loads torch's compiler (1.3 s).
        self.embedding = Embedding.from_pretrained(torch.empty(vocab_size, config.dim), freeze=False)
        self.blocks = nn.ModuleList(Block(config, gate) for gate in gates)
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def tune_training(self, compiled: bool, recompute: Recompute) -> None:
        """How blocks run in training mode: through `torch.compile` or not, and what of them is formed anew for the
        backward pass. Validation and decoding stay as they are.

        Blocks are compiled one by one, so that those with the same mixer share the work: as one graph the 24 layers of
        the 340M model take 62 s to compile, and 27 s from caches, for a step that is 1 % faster.
        """
        run = compiled_block(len(self.blocks)) if compiled else run_block
        for block in self.blocks:
            cast(Block, block).train_with(run, recompute)

    def new_cache(self, batch: int, length: int) -> list[Any]:
        """What each layer keeps of the tokens before, for `batch` sequences: nothing yet, and on the device of the
        weights. All memory that decoding keeps is taken here.

        A gla layer keeps a state of one size (`RecurrentCache`), a softmax layer the keys and values of `length`
        tokens, or of its window if that is shorter (`SoftmaxCache`). Raises `ValueError` for a number below 1.
        """
        for name, given in (("batch", batch), ("length", length)):
            if given < 1:
                raise ValueError(f"{name}: got {given}, takes a whole number from 1")
        return [cast(Block, block).mixer.new_cache(batch, length) for block in self.blocks]

    def hidden(self, tokens: Tensor, cache: list[Any] | None = None) -> Tensor:
        """tokens [B,T] → normalised hidden states [B,T,dim], what the head reads."""
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[layer])
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: list[Any] | None = None) -> Tensor:
        """With a `cache` from `new_cache`, the T ≥ 1 tokens go on from those that it has seen, and it is updated in
        place; without gradients. Raises `ValueError` for more tokens than a softmax layer's cache holds."""
        if cache is None:
            return self.head(self.hidden(tokens))
        with torch.no_grad():
            return self.head(self.hidden(tokens, cache))


def build_model(config: ModelConfig, vocab_size: int, seed: int = 0) -> LanguageModel:
    """The network with its initial weights; torch's generators are left untouched.

    `config` has passed `check_model`. Every weight outside the gates is a function of (seed, its name) alone.
    """
    gates = build_gates(config, seed)
    with seeded(seed, "discarded"):  # torch's modules draw weights of their own when constructed
        model = LanguageModel(config, vocab_size, gates)
    initialise(model, config.layers, seed)
    return model
