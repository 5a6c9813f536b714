"""The gate of a gated-linear-attention layer: what varies in an ablation, and the registry that names the variants.

A gate maps the layer's input to the log forget gate g ≤ 0 of the recurrence

    S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t,    o_t = scale · q_t S_t        (arXiv 2312.06635, section 4.1; α = exp(g))

and may rewrite k and v on the way. The forget gates of published models differ in what g depends on and in its shape:

    none         g is None            linear attention, nothing is forgotten
    [H]          one number a head    RetNet
    [B,T,H]      a head and token     Mamba-2, gated RetNet
    [B,T,H,K]    a key channel too    GLA

The keyword-only parameters of a gate's `__init__` are its options in YAML (`registry.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.errors import ConfigError
from gla_ablate.registry import Registry

DECAY_SHAPES = ("none", "[H]", "[B,T,H]", "[B,T,H,K]")


@dataclass(frozen=True)
class GateShape:
    """What a gate is told of its layer. `key_dim` (K) and `value_dim` (V) are per head; `layer` counts from 0."""

    dim: int
    heads: int
    key_dim: int
    value_dim: int
    layer: int
    layers: int


class Gate(nn.Module):
    """Base of all gates. A subclass states `decay_shape`, defines `forward` and registers itself:

        @register_gate("my_gate")
        class MyGate(Gate):
            decay_shape = "[B,T,H]"
            def __init__(self, shape: GateShape, *, floor: float = 0.9) -> None: ...
            def forward(self, x): ...

    Its parameters may be initialised with any of torch's functions: the model seeds the generator for each layer's
    gate, so that they depend on the seed and the layer alone.
    """

    formula: ClassVar[str] = ""  # the gate in a line, for --list-gates
    decay_shape: ClassVar[str]  # one of DECAY_SHAPES
    source: ClassVar[str] = ""  # where it was published

    def __init__(self) -> None:
        super().__init__()
        self.shared: nn.Module | None = None  # what `build_shared` returned: set by the model after construction

    @classmethod
    def build_shared(cls, shape: GateShape) -> nn.Module | None:
        """Parameters that the gates of all layers share; called once a model, with the shape of layer 0.
        Each gate finds them under `self.shared`."""
        return None

    def forward(self, x: Tensor) -> Tensor | None:
        """x [B,T,dim] → g ≤ 0, fp32, in the shape that `decay_shape` states (None for "none")."""
        raise NotImplementedError

    def transform(self, g: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k [B,T,H,K] and v [B,T,H,V] as the recurrence shall see them; as they are by default."""
        return k, v


GATES: Registry[Gate] = Registry("gate")


def register_gate(name: str) -> Callable[[type[Gate]], type[Gate]]:
    """Class decorator that makes a gate usable as `model.gate.name`. Raises `ConfigError` for a name that another class
    holds and for a `decay_shape` that isn't one of `DECAY_SHAPES`."""

    def add(cls: type[Gate]) -> type[Gate]:
        stated = getattr(cls, "decay_shape", None)
        if stated not in DECAY_SHAPES:
            raise ConfigError(f"gate {name!r}: decay_shape is {stated!r}, takes one of {', '.join(DECAY_SHAPES)}")
        return GATES.register(name)(cls)

    return add


@register_gate("data_dependent")
class DataDependentGate(Gate):
    """GLA's gate: a low-rank map of the input, a sigmoid a key channel, and a temperature τ that slows forgetting
    (section 4.4: rank 16, τ = 16)."""

    formula = "g = logsigmoid(x W₁ W₂ + b) / τ"
    decay_shape = "[B,T,H,K]"
    source = "GLA, arXiv 2312.06635, section 4.4"

    def __init__(self, shape: GateShape, *, rank: int = 16, tau: float = 16.0) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"model.gate.rank: got {rank}, takes a whole number from 1")
        if not (math.isfinite(tau) and tau > 0):
            raise ConfigError(f"model.gate.tau: got {tau}, takes a number above 0")
        self.heads, self.tau = shape.heads, tau
        self.down = nn.Linear(shape.dim, rank, bias=False)
        self.up = nn.Linear(rank, shape.heads * shape.key_dim)
        nn.init.zeros_(self.up.bias)  # g starts around log(1/2)/τ: a memory of 23 tokens at τ = 16

    def forward(self, x: Tensor) -> Tensor:
        logits = self.up(self.down(x)).float()  # logsigmoid in 16 bits would round slow gates to none
        return (F.logsigmoid(logits) / self.tau).unflatten(-1, (self.heads, -1))  # [B, T, H, K]


@register_gate("fixed_decay")
class FixedDecayGate(Gate):
    """RetNet's decay: a constant a head, slower from head to head; nothing to learn."""

    formula = "g_h = log(1 − 2^(−5−h))"
    decay_shape = "[H]"
    source = "RetNet, arXiv 2307.08621, section 2.1"

    g: Tensor

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        # Plain numbers: arithmetic on meta tensors, as in `count_parameters`, costs a second of imports inside torch.
        decay = [math.log1p(-(2.0 ** (-5 - head))) for head in range(shape.heads)]
        self.register_buffer("g", torch.tensor(decay), persistent=False)  # [H]

    def forward(self, x: Tensor) -> Tensor:
        return self.g


@register_gate("none")
class NoGate(Gate):
    """Linear attention as it was before gates: the state only ever grows."""

    formula = "no decay"
    decay_shape = "none"
    source = "linear attention, arXiv 2006.16236"

    def __init__(self, shape: GateShape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> None:
        return None
