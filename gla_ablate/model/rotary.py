"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2): q and k turn with their position, so that their product
depends on the distance between two tokens alone.

    (x_i, x_{i+D/2}) turned by the angle  position · 10000^(−2i/D),    i = 0 … D/2 − 1

The channels of a pair lie D/2 apart, as in Llama. RetNet turns its queries and keys by the same angles (arXiv
2307.08621, section 2.1), beside its decay. With a decay of its own for each channel the distance is no longer all that
counts, unless both channels of a pair decay alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def rotations(start: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[T,1,D/2]` of the angles of the T tokens of x `[B,T,H,D]`, the first of which has position `start`.

    fp32, fp64 for an x in it. The angles themselves are fp64: in fp32 that of token 2^20 would be off by up to 0.06.
    """
    length, dim = x.shape[1], x.shape[-1]
    position = torch.arange(start, start + length, device=x.device, dtype=torch.float64)
    speed = BASE ** (torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / -dim)
    angles = (position[:, None] * speed)[:, None]  # [T, 1, D/2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B,T,H,D]`, D even, turned; computed in the dtype of cos and sin, returned in its own."""
    a, b = x.to(cos.dtype).chunk(2, -1)  # [B, T, H, D/2] each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
