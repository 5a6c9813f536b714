"""The GLA layer: the mixing of tokens in a block (arXiv 2312.06635, section 4.4).

    q, k, v = x W_q, x W_k, x W_v          g = gate(x)          (k and v as the gate transforms or makes them)
    o       = gated_linear_attention(q, k, v, g)         per head; with gv too, if the gate gives one
    y       = (RMSNorm(o) ⊙ swish(x W_r)) W_o            the norm per head, its weight shared by the heads

Following FLA, the norm is an RMSNorm where the paper has a LayerNorm, and no projection has a bias. Two options that
the paper's layer doesn't have: a short convolution on q, k and v before all else, rotary positions on q and k after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.config import ModelConfig
from gla_ablate.model.gates import Gate, as_stated
from gla_ablate.model.norm import rms_norm
from gla_ablate.model.rotary import rotate, rotations
from gla_ablate.model.shapes import key_width, value_width
from gla_ablate.model.short_conv import ShortConv
from gla_ablate.model.softmax import activation_dtype, cast_once
from gla_ablate.ops import gated_linear_attention, gated_linear_attention_step


@dataclass
class RecurrentCache:
    """What a gla layer keeps of the tokens before."""

    state: Tensor  # [B, H, K, V], fp32
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of the convolution of q, k, v: the last [B, W − 1, width]
    position: int = 0  # tokens seen


class GLAMixer(nn.Module):
    """x [B,T,dim] → [B,T,dim], causal. `gate` belongs to this layer alone."""

    def __init__(self, config: ModelConfig, gate: Gate) -> None:
        super().__init__()
        self.heads, self.chunk_size, self.backend = config.heads, config.chunk_size, config.backend
        self.short_conv, self.rope, self.eps = config.short_conv, config.rope, config.norm_eps
        self.q_proj = nn.Linear(config.dim, key_width(config), bias=False)
        if not gate.own_keys:
            self.k_proj = nn.Linear(config.dim, key_width(config), bias=False)
        self.v_proj = nn.Linear(config.dim, value_width(config), bias=False)
        self.gate = gate
        self.norm = nn.RMSNorm(value_width(config) // config.heads, eps=config.norm_eps)
        self.output_gate_proj = nn.Linear(config.dim, value_width(config), bias=False)
        self.out_proj = nn.Linear(value_width(config), config.dim, bias=False)
        if self.short_conv:
            self.q_conv = ShortConv(key_width(config), self.short_conv)
            if not gate.own_keys:
                self.k_conv = ShortConv(key_width(config), self.short_conv)
            self.v_conv = ShortConv(value_width(config), self.short_conv)

    def new_cache(self, batch: int, length: int) -> RecurrentCache:
        """Of zeros, on the device of the weights; of one size, whatever the `length` of the sequences."""
        weight, K, V = self.q_proj.weight, self.q_proj.out_features, self.v_proj.out_features
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        state = weight.new_zeros(batch, self.heads, K // self.heads, V // self.heads, dtype=wide)
        widths = {"q": K, "v": V} | ({} if self.gate.own_keys else {"k": K}) if self.short_conv else {}
        dtype = activation_dtype(weight)
        inputs = {x: weight.new_zeros(batch, self.short_conv - 1, n, dtype=dtype) for x, n in widths.items()}
        return RecurrentCache(state, inputs)

    def forward(self, x: Tensor, cache: RecurrentCache | None = None) -> Tensor:
        """With a `cache`, x goes on from the tokens in it and is taken in; under `torch.no_grad()`."""
        y = cast_once(x, self.q_proj.weight)
        q = self.projected("q", y, cache)  # [B, T, H, K]
        k = None if self.gate.own_keys else self.projected("k", y, cache)  # [B, T, H, K]
        v = self.projected("v", y, cache)  # [B, T, H, V]
        g, gv = as_stated(self.gate, self.gate(x))
        k, v = self.gate.transform(g, self.gate.keys(g).to(v.dtype) if k is None else k, v)
        if self.rope:  # of k as the recurrence sees it: a gate may have replaced it
            turn = rotations(0 if cache is None else cache.position, q)
            q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is None:
            o, _ = gated_linear_attention(q, k, v, g, gv=gv, chunk_size=self.chunk_size, backend=self.backend)
        else:
            o = self.attend_on(q, k, v, g, gv, cache)
        swish = F.silu(self.output_gate_proj(y))
        if not torch.is_grad_enabled():
            return self.out_proj(rms_norm(o, self.norm.weight, self.eps).flatten(-2) * swish)
        # As in SwiGLU: the norm's weight on the side of the weights.
        return F.linear(
            rms_norm(o, None, self.eps).flatten(-2) * swish, self.out_proj.weight * self.norm.weight.repeat(self.heads)
        )

    def projected(self, name: str, y: Tensor, cache: RecurrentCache | None) -> Tensor:
        """ "q", "k" or "v" of y [B,T,dim], convolved if this layer does so: [B,T,H,·]."""
        x = getattr(self, f"{name}_proj")(y)
        if self.short_conv:
            x = getattr(self, f"{name}_conv")(x, None if cache is None else cache.inputs[name])
        return x.unflatten(-1, (self.heads, -1))

    def attend_on(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, cache: RecurrentCache
    ) -> Tensor:
        """o of T more tokens [B,T,H,·], which the cache's state takes in: one by a step, several by chunks."""
        cache.position += q.shape[1]
        if q.shape[1] == 1:
            gate = g if g is None or g.ndim == 1 else g[:, 0]  # [H], [B, H] or [B, H, K]
            step = gated_linear_attention_step(
                q[:, 0], k[:, 0], v[:, 0], gate, cache.state, gv=None if gv is None else gv[:, 0], backend=self.backend
            )
            return step.unsqueeze(1)
        o, state = gated_linear_attention(
            q, k, v, g, gv=gv, initial_state=cache.state, output_final_state=True, chunk_size=self.chunk_size,
            backend=self.backend,
        )  # fmt: skip
        cache.state.copy_(cast(Tensor, state))
        return o
