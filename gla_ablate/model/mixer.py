"""The GLA layer: the mixing of tokens in a block (arXiv 2312.06635, section 4.4).

    q, k, v = x W_q, x W_k, x W_v          g = gate(x)
    o       = gated_linear_attention(q, k, v, g)         per head
    y       = (RMSNorm(o) ⊙ swish(x W_r)) W_o            the norm per head, its weight shared by the heads

Following FLA, the norm is an RMSNorm where the paper has a LayerNorm, and no projection has a bias.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.config import ModelConfig
from gla_ablate.model.gates import Gate
from gla_ablate.model.shapes import key_width, value_width
from gla_ablate.ops import gated_linear_attention

NORM_EPS = 1e-5


class GLAMixer(nn.Module):
    """x [B,T,dim] → [B,T,dim], causal. `gate` belongs to this layer alone."""

    def __init__(self, config: ModelConfig, gate: Gate) -> None:
        super().__init__()
        self.heads, self.chunk_size, self.backend = config.heads, config.chunk_size, config.backend
        self.q_proj = nn.Linear(config.dim, key_width(config), bias=False)
        self.k_proj = nn.Linear(config.dim, key_width(config), bias=False)
        self.v_proj = nn.Linear(config.dim, value_width(config), bias=False)
        self.gate = gate
        self.norm = nn.RMSNorm(value_width(config) // config.heads, eps=NORM_EPS)
        self.output_gate_proj = nn.Linear(config.dim, value_width(config), bias=False)
        self.out_proj = nn.Linear(value_width(config), config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # [B, T, H, K]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1))  # [B, T, H, K]
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))  # [B, T, H, V]
        g = self.gate(x)
        k, v = self.gate.transform(g, k, v)
        o, _ = gated_linear_attention(q, k, v, g, chunk_size=self.chunk_size, backend=self.backend)
        # In o's own dtype: under autocast a norm with an fp32 weight would leave the fused kernel.
        o = F.rms_norm(o, self.norm.normalized_shape, self.norm.weight.to(o.dtype), NORM_EPS)
        return self.out_proj(o.flatten(-2) * F.silu(self.output_gate_proj(x)))
