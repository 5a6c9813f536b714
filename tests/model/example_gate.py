"""A user's gate as a plugin file has it: a decay that each head learns and starts differently."""

import torch

from gla_ablate.model import Gate, GateShape, register_gate


@register_gate("my_decay")
class MyDecay(Gate):
    formula = "g_h = −softplus(a_h)"
    decay_shape = "[H]"

    def __init__(self, shape: GateShape, *, slowest: float = -6.0) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.linspace(-1.0, slowest, shape.heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.softplus(self.a)
