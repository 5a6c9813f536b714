"""The floor: the time that no kernel can beat on this device, from what must be moved and multiplied.

    floor = Σ over passes of max(bytes / bandwidth, operations / rate),    passes: forward; backward, if it runs

bytes       forward reads q, k, v, g and writes o; backward reads q, k, v, g, do and writes dq, dk, dv, dg. q, k, v, o
            and their gradients take 2 bytes a number (bf16), g and dg 4. States, scores and whatever else a kernel
            keeps in memory count nothing: a kernel that fused everything would not have them.
operations  forward writes a token into the state and reads it out, 2·K·V each a head; backward forms dq, dk, dv and the
            state's gradient, as many each. Scores inside a chunk count nothing: their number is the algorithm's choice.

A fixed decay (`[H]`) gets no gradient, and its own size is nothing beside the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shapes import Shape

from gla_ablate.utilisation import matrix_rate


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches on the plainest of work: bytes read and written a second, operations a second."""

    bandwidth: float
    rate: float


def measured_ceilings() -> Ceilings:
    """A copy of 1 GiB, and an 8192³ product of random bf16 numbers."""
    import triton

    source = torch.zeros(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return Ceilings(2 * source.numel() / copy * 1e3, matrix_rate(torch.bfloat16))


def bytes_moved(shape: Shape, kind: str) -> tuple[int, int]:
    """Forward and backward."""
    rows = shape.B * shape.T * shape.H
    qk, vo = 2 * 2 * shape.K * rows, 2 * 2 * shape.V * rows  # two of each width: q and k, v and o
    g = {"none": 0, "head": 0, "token": 4 * rows, "channel": 4 * shape.K * rows}[kind]
    return qk + vo + g, (qk + vo + g) + (qk + vo // 2 + g)


def operations(shape: Shape) -> tuple[int, int]:
    """Forward and backward."""
    state = 2 * shape.B * shape.T * shape.H * shape.K * shape.V
    return 2 * state, 4 * state


def floor_ms(shape: Shape, kind: str, ceilings: Ceilings) -> tuple[float, float]:
    """Of the forward pass, and of both passes."""
    forward, backward = (
        1e3 * max(moved / ceilings.bandwidth, done / ceilings.rate)
        for moved, done in zip(bytes_moved(shape, kind), operations(shape), strict=True)
    )
    return forward, forward + backward
