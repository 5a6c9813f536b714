"""One block of the network: RMSNorm → mixer → residual, RMSNorm → SwiGLU → residual."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.config import ModelConfig
from gla_ablate.model.gates import Gate
from gla_ablate.model.mixer import NORM_EPS, GLAMixer
from gla_ablate.model.shapes import ffn_width
from gla_ablate.model.softmax import SoftmaxMixer


class SwiGLU(nn.Module):
    """(swish(x W₁) ⊙ x W₂) W₃, arXiv 2002.05202; [B,T,dim] → [B,T,dim]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.swish_proj = nn.Linear(config.dim, ffn_width(config), bias=False)
        self.up_proj = nn.Linear(config.dim, ffn_width(config), bias=False)
        self.down_proj = nn.Linear(ffn_width(config), config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.swish_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x [B,T,dim] → [B,T,dim]. Without a gate its mixer is softmax attention."""

    def __init__(self, config: ModelConfig, gate: Gate | None) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.mixer = SoftmaxMixer(config) if gate is None else GLAMixer(config, gate)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """With a `cache` of its mixer's, x goes on from it."""
        x = x + self.mixer(self.mixer_norm(x), cache)
        return x + self.ffn(self.ffn_norm(x))
