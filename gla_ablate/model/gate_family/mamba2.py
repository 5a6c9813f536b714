"""Mamba-2's decay: a time step from the input, which is also the weight of what the state takes in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.errors import ConfigError
from gla_ablate.model.gates import Gate, GateShape, register_gate

RATES = (1.0, 16.0)  # of decay per unit of time: where the heads start


@register_gate("mamba2")
class Mamba2Gate(Gate):
    """One time step Δ a head and token, and a rate a = exp(A_log) a head: the state decays by exp(−a Δ) and takes in
    Δ v. It starts as published: a uniform from 1 to 16, softplus(b) log-uniform from `dt_min` to `dt_max`.

    Left out: the convolution (`model.short_conv` adds one), the skip D, and that all heads share their keys and queries
    (B and C there).
    """

    formula = "Δ = softplus(x W + b), g = −exp(A_log) Δ, v ← Δ v"
    decay_shape = "[B,T,H]"
    source = "Mamba-2, arXiv 2405.21060, section 7"

    def __init__(self, shape: GateShape, *, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        super().__init__()
        for name, given in (("dt_min", dt_min), ("dt_max", dt_max)):
            if not (math.isfinite(given) and given > 0):
                raise ConfigError(f"model.gate.{name}: got {given}, takes a number above 0")
        if dt_min > dt_max:
            raise ConfigError(f"model.gate.dt_min: got {dt_min}, takes at most model.gate.dt_max, {dt_max}")
        self.proj = nn.Linear(shape.dim, shape.heads, bias=False)
        dt = torch.empty(shape.heads).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # [H], softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(shape.heads).uniform_(*RATES).log())  # [H]

    def rate(self) -> Tensor:
        return self.A_log.float().exp()  # [H]

    def forward(self, x: Tensor) -> Tensor:
        # softplus(z) = −logsigmoid(−z): PyTorch 2.13 misjudges the strides of softplus's gradient under torch.compile's
        # backend "aot_eager".
        return self.rate() * F.logsigmoid(-(self.proj(x).float() + self.dt_bias.float()))  # [B, T, H]

    def transform(self, g: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert g is not None
        dt = -g / self.rate()  # from g, so that nothing has to be kept between two calls
        return k, (v * dt[..., None]).to(v.dtype)
