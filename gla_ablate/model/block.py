"""One block of the network: RMSNorm → mixer → residual, RMSNorm → SwiGLU → residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.config import ModelConfig
from gla_ablate.model.gates import Gate
from gla_ablate.model.mixer import GLAMixer
from gla_ablate.model.norm import rms_norm
from gla_ablate.model.recompute import Recompute, RunBlock, run_block
from gla_ablate.model.shapes import ffn_width
from gla_ablate.model.softmax import SoftmaxMixer, cast_once


class SwiGLU(nn.Module):
    """(swish(y W₁) ⊙ y W₂) W₃ with y = x ⊙ scale, arXiv 2002.05202; x [B,T,dim] → [B,T,dim], scale [dim]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.swish_proj = nn.Linear(config.dim, ffn_width(config), bias=False)
        self.up_proj = nn.Linear(config.dim, ffn_width(config), bias=False)
        self.down_proj = nn.Linear(ffn_width(config), config.dim, bias=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        swish, up = self.swish_proj.weight, self.up_proj.weight
        if torch.is_grad_enabled():
            # On the weights' side, so that the gradient of the scale is a sum over rows of weights: over tokens, it is
            # a pass of its own over the activations.
            swish, up = swish * scale, up * scale
        else:  # a token's decoding is bound by reading weights: once, as they are
            x = cast_once(x * scale.to(x.dtype), swish)
        return self.down_proj(F.silu(F.linear(x, swish)) * F.linear(x, up))


class Block(nn.Module):
    """x [B,T,dim] → [B,T,dim]. Without a gate its mixer is softmax attention."""

    def __init__(self, config: ModelConfig, gate: Gate | None) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.mixer_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = SoftmaxMixer(config) if gate is None else GLAMixer(config, gate)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = SwiGLU(config)
        self.train_with(run_block, "none")

    def train_with(self, run: RunBlock, recompute: Recompute) -> None:
        """See `LanguageModel.tune_training`."""
        self.run, self.recompute = run, recompute

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """With a `cache` of its mixer's, x goes on from it."""
        if self.training and cache is None:
            return self.run(self.layers, x, self.recompute)
        return self.layers(x, cache)

    def layers(self, x: Tensor, cache: Any = None) -> Tensor:
        x = x + self.mixer(rms_norm(x, self.mixer_norm.weight, self.eps), cache)
        return x + self.ffn(rms_norm(x, None, self.eps), self.ffn_norm.weight)
