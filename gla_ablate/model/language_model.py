"""The language model: token embedding, blocks, final norm, output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gla_ablate.config import ModelConfig
from gla_ablate.model.block import Block
from gla_ablate.model.gates import Gate
from gla_ablate.model.initialise import initialise, seeded
from gla_ablate.model.mixer import NORM_EPS
from gla_ablate.model.shapes import build_gates


class LanguageModel(nn.Module):
    """Next-token model: tokens [B,T] → logits [B,T,vocab]. Made by `build_model`."""

    def __init__(self, config: ModelConfig, vocab_size: int, gates: list[Gate]) -> None:
        super().__init__()
        # Without nn.Embedding's own draw: it is not needed, and on the meta device it loads torch's compiler (1.3 s).
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, config.dim), freeze=False)
        self.blocks = nn.ModuleList(Block(config, gate) for gate in gates)
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens [B,T] → normalised hidden states [B,T,dim], what the head reads."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def build_model(config: ModelConfig, vocab_size: int, seed: int = 0) -> LanguageModel:
    """The network with its initial weights; torch's generators are left untouched.

    `config` has passed `check_model`. Every weight outside the gates is a function of (seed, its name) alone.
    """
    gates = build_gates(config, seed)
    with seeded(seed, "discarded"):  # torch's modules draw weights of their own when constructed
        model = LanguageModel(config, vocab_size, gates)
    initialise(model, config.layers, seed)
    return model
