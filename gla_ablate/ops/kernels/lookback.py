"""Segments of a sequence in one launch, in the manner of the decoupled look-back of Merrill and Garland (2016).

Each goes over its tiles from a state of zero, publishes what it would end with, and begins anew with what all that come
before it have published: theirs also publishes sums, which here would make one wait for another. Nobody waits before
having published, and a program waits for lower numbers alone. That these begin no later CUDA doesn't promise, but chips
hold it and other libraries rely on it; else numbers would have to be drawn (`atomic_add`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import NONE
from gla_ablate.ops.kernels.places import segment_at

_NONE = tl.constexpr(NONE)
AT_ONCE = tl.constexpr(128)  # segments that a program waits for together


@triton.jit
def in_order(
    i, i_n, segments, own_segments, SEG, NSEG, NT, REVERSE: tl.constexpr, VARLEN: tl.constexpr
):  # fmt: skip
    """Of segment i: its first tile, the one after its last, and how many segments of its sequence come before it, all
    of lower numbers: back in time the first takes a sequence's last tiles."""
    base, count = i_n * NSEG, NSEG
    if VARLEN:
        base, count = tl.load(own_segments + 3 * i_n), tl.load(own_segments + 3 * i_n + 1)
    at = 2 * base + count - 1 - i if REVERSE else i
    _n, begin, stop, _row = segment_at(at, segments, SEG, NSEG, NT, VARLEN)
    return begin, stop, i - base


@triton.jit
def publish(
    b_s, through, borders, passed, flags, place, i_slice, o_k, o_v, m_s, K: tl.constexpr, V: tl.constexpr,
    SLICES: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """b_s `[BV, BK]`, what a segment ends with if it begins with zero, and `through`, what a state is multiplied by."""
    tl.store(borders + place.to(tl.int64) * K * V + o_v[:, None] * K + o_k[None, :], b_s, mask=m_s)
    if GATE != _NONE:
        tl.store(passed + place, through)
    tl.debug_barrier()  # all threads have stored before one says so
    tl.atomic_xchg(flags + place * SLICES + i_slice, 1, sem="release")


@triton.jit
def look_back(
    b_s, borders, passed, flags, place, i_slice, before, o_k, o_v, m_s, HB, K: tl.constexpr, V: tl.constexpr,
    SLICES: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What a segment begins with, of what its sequence does, b_s `[BV, BK]`, and of the `before` segments before it."""
    for i in range(0, before, AT_ONCE):
        o_j = i + tl.arange(0, AT_ONCE)
        m_j = o_j < before
        p = flags + (place - (before - o_j) * HB) * SLICES + i_slice
        ready = 0
        while ready < tl.minimum(before - i, AT_ONCE):
            ready = tl.sum(tl.where(m_j, tl.atomic_add(p, 0, mask=m_j, sem="acquire"), 0))
    for j in tl.range(0, before, loop_unroll_factor=4):
        other = place - (before - j) * HB
        b_e = tl.load(borders + other.to(tl.int64) * K * V + o_v[:, None] * K + o_k[None, :], mask=m_s, other=0.0)
        if GATE != _NONE:
            b_s *= tl.load(passed + other)
        b_s += b_e
    return b_s
