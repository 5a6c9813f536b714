"""What is measured: the sizes, the kinds of gate, and the inputs drawn for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

KINDS = ("none", "head", "token", "channel")
STRENGTHS = ("usual", "weak", "strong")
TOKENS = 32768  # in each batch of the sweep over lengths
SOFTMAX_HEAD = 128  # the width that the kernels of softmax attention are made for


@dataclass(frozen=True)
class Shape:
    """q, k `[B, T, H, K]`, v `[B, T, H, V]`."""

    name: str
    B: int
    T: int
    H: int
    K: int
    V: int

    def softmax(self) -> Shape:
        """Softmax attention on the same tokens and the same hidden width H·V."""
        return Shape(self.name, self.B, self.T, self.H * self.V // SOFTMAX_HEAD, SOFTMAX_HEAD, SOFTMAX_HEAD)


def square(B: int, T: int, H: int, D: int) -> Shape:
    return Shape(f"B{B}T{T}H{H}D{D}", B, T, H, D, D)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("340M", 16, 2048, 4, 128, 256),  # a layer of the paper's models
        Shape("1.3B", 16, 2048, 4, 256, 512),
        Shape("long", 1, 32768, 4, 256, 512),
        square(1, 8192, 96, 128),  # the sizes that flash-linear-attention's own benchmark takes
        square(2, 16384, 16, 128),
        square(4, 2048, 16, 128),
        square(4, 4096, 64, 128),
        square(8, 2048, 32, 256),
        square(8, 1024, 8, 64),
    )
}
SWEEP = [Shape(f"T{T}", TOKENS // T, T, 4, 256, 512) for T in (512, 1024, 2048, 4096, 8192, 16384, 32768)]


def fixed_decay(H: int, device: str) -> Tensor:
    """RetNet's decay of each head, rounded as an op that forms it in fp32 from 1 − 2^(−5−h) rounds it."""
    return (1 - torch.exp2(-5 - torch.arange(H, dtype=torch.float32, device=device))).log()


def gate(shape: Shape, kind: str, strength: str, device: str) -> Tensor | None:
    """Log decays in fp32. A gate of kind "head" is RetNet's whatever the strength: that one alone is built into FLA's
    op, and two ops compare at the same gate only."""
    if kind in ("none", "softmax"):
        return None
    if kind == "head":
        return fixed_decay(shape.H, device)
    sizes = {"token": (shape.B, shape.T, shape.H), "channel": (shape.B, shape.T, shape.H, shape.K)}
    x = torch.randn(sizes[kind], device=device)
    if strength == "usual":
        return logsigmoid(x) / 16
    return x.fill_({"weak": -0.01, "strong": -8.0}[strength])


def inputs(shape: Shape, kind: str, strength: str, device: str) -> list[Tensor]:
    """q, k, v in bf16 and, if there is one, g."""
    torch.manual_seed(0)
    widths = (shape.K, shape.K, shape.V)
    qkv = [torch.randn(shape.B, shape.T, shape.H, n, device=device, dtype=torch.bfloat16) for n in widths]
    g = gate(shape, kind, strength, device)
    return qkv if g is None else [*qkv, g]
