"""HGRN2: keys are what the gate forgets, and each layer's forget gate has a lower bound that rises with the layer."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.model.gates import Gate, GateShape, register_gate


class LowerBounds(nn.Module):
    """Γ, from which the bounds of all layers come: zeros, so that they start evenly spaced."""

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.sizes = shape.layers, shape.heads, shape.key_dim
        self.weight = nn.Parameter(torch.zeros(shape.layers * shape.heads * shape.key_dim))  # a vector: see `Gate`

    def shares(self) -> Tensor:
        """softmax over the layers, [L, H, K]."""
        return self.weight.float().view(self.sizes).softmax(0)


@register_gate("hgrn2")
class HGRN2Gate(Gate):
    """f = exp(g) lies between a bound γ and 1, and k = 1 − f: what is forgotten makes room for as much that is new.
    The bound of layer l = 1 … L is γ_l = Σ softmax(Γ)_i over i = 2 … l, softmax over the layers: 0 in the first, and
    higher in each that follows. Γ is one parameter for all layers, those without a gate counted too.

    Left out: the swish on q, and the norm of the whole output in place of one a head.
    """

    formula = "f = γ + (1 − γ) σ(x W), γ of all layers from one Γ; g = log f, k = 1 − f"
    decay_shape = "[B,T,H,K]"
    source = "HGRN2, arXiv 2404.07904, section 3; γ: HGRN, arXiv 2311.04823"
    own_keys = True

    below: Tensor

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.proj = nn.Linear(shape.dim, shape.heads * shape.key_dim, bias=False)
        # As a tensor: a number of its own would have each layer compiled anew.
        below = [float(0 < layer <= shape.layer) for layer in range(shape.layers)]
        self.register_buffer("below", torch.tensor(below), persistent=False)  # [L]

    @classmethod
    def build_shared(cls, shape: GateShape) -> LowerBounds:
        return LowerBounds(shape)

    def lower_bound(self) -> Tensor:
        """γ of this layer, [H, K]."""
        return (self.below[:, None, None] * cast(LowerBounds, self.shared).shares()).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """log(σ(z) + γ σ(−z)), which is log f, by its two logarithms: finite for any z."""
        z = self.proj(x).float().unflatten(-1, (self.heads, -1))  # [B, T, H, K]
        # The bound of the first layer is 0, which has no logarithm: the least number takes its place.
        log_bound = self.lower_bound().clamp(min=torch.finfo(torch.float32).tiny).log()
        g = torch.logaddexp(F.logsigmoid(z), log_bound + F.logsigmoid(-z))
        return g.clamp(max=0)  # γ of nearly 1 may round to above 0

    def keys(self, g: Tensor | None) -> Tensor:
        assert g is not None
        return -torch.expm1(g)  # 1 − f, without the loss of digits near f = 1
