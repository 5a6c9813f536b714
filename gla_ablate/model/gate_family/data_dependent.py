"""Gates that are a sigmoid of a linear map of the input, with a temperature τ that slows forgetting."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.errors import ConfigError
from gla_ablate.model.gates import VALUED, Gate, GateShape, register_gate


class SigmoidGate(Gate):
    """logsigmoid(z) / τ. At z = 0, where the gates here start on average, it is a memory of 1.44 τ tokens."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        if not (math.isfinite(tau) and tau > 0):
            raise ConfigError(f"model.gate.tau: got {tau}, takes a number above 0")
        self.tau = tau

    def slowed(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits.float()) / self.tau  # in 16 bits logsigmoid would round slow gates to none


def checked(rank: int) -> int:
    if rank < 1:
        raise ConfigError(f"model.gate.rank: got {rank}, takes a whole number from 1")
    return rank


@register_gate("data_dependent")
class DataDependentGate(SigmoidGate):
    """GLA's gate: a low-rank map of the input, a sigmoid a key channel, and a temperature τ that slows forgetting
    (section 4.4: rank 16, τ = 16)."""

    formula = "g = logsigmoid(x W₁ W₂ + b) / τ"
    decay_shape = "[B,T,H,K]"
    source = "GLA, arXiv 2312.06635, section 4.4"

    def __init__(self, shape: GateShape, *, rank: int = 16, tau: float = 16.0) -> None:
        super().__init__(tau)
        self.heads = shape.heads
        self.down = nn.Linear(shape.dim, checked(rank), bias=False)
        self.up = nn.Linear(rank, shape.heads * shape.key_dim)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.slowed(self.up(self.down(x))).unflatten(-1, (self.heads, -1))  # [B, T, H, K]


@register_gate("data_dependent_kv")
class KeyValueGate(SigmoidGate):
    """The general form of GLA: S decays by α on key channels and by β on value channels, α_tᵀ β_t on each of its
    numbers. Both are GLA's low-rank gate, from the same x W₁ of `rank` channels; the paper sets β to 1, for the sake of
    a fast kernel.
    """

    formula = "g = logsigmoid(x W₁ W₂ + b) / τ, gv = logsigmoid(x W₁ W₃ + c) / τ"
    decay_shape = VALUED
    source = "GLA, arXiv 2312.06635, section 4.1 (G = αᵀ β)"

    def __init__(self, shape: GateShape, *, rank: int = 16, tau: float = 16.0) -> None:
        super().__init__(tau)
        self.heads = shape.heads
        self.down = nn.Linear(shape.dim, checked(rank), bias=False)
        self.up = nn.Linear(rank, shape.heads * shape.key_dim)
        self.up_values = nn.Linear(rank, shape.heads * shape.value_dim)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.up_values.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        thin = self.down(x)
        g, gv = (self.slowed(up(thin)).unflatten(-1, (self.heads, -1)) for up in (self.up, self.up_values))
        return g, gv  # [B, T, H, K], [B, T, H, V]


@register_gate("data_dependent_full_rank")
class FullRankGate(SigmoidGate):
    """GLA's gate with a matrix of full rank in place of the product of two thin ones: what the low rank costs, and
    what it saves."""

    formula = "g = logsigmoid(x W + b) / τ"
    decay_shape = "[B,T,H,K]"
    source = "GLA, arXiv 2312.06635, section 4.4, without its low rank"

    def __init__(self, shape: GateShape, *, tau: float = 16.0) -> None:
        super().__init__(tau)
        self.heads = shape.heads
        self.proj = nn.Linear(shape.dim, shape.heads * shape.key_dim)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.slowed(self.proj(x)).unflatten(-1, (self.heads, -1))  # [B, T, H, K]


@register_gate("data_dependent_scalar")
class ScalarGate(SigmoidGate):
    """Gated RetNet's decay: one a head and token. The bias, which starts at 0, is GLA's; there is none in that paper.

    Left out: its rotary positions, which `model.rope` adds, and the cross-decoder of the model that it is part of.
    """

    formula = "g_h = logsigmoid(x w_h + b_h) / τ"
    decay_shape = "[B,T,H]"
    source = "gated RetNet (YOCO), arXiv 2405.05254, section 3.1"

    def __init__(self, shape: GateShape, *, tau: float = 16.0) -> None:
        super().__init__(tau)
        self.proj = nn.Linear(shape.dim, shape.heads)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.slowed(self.proj(x))  # [B, T, H]
