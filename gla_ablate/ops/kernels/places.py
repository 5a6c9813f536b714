"""Where the segments lie that a scan goes over, and what they begin with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_at(i, segments, SEG, NSEG, NT, VARLEN: tl.constexpr):
    """Of segment i: its sequence (−1: there is no such segment), its first tile, the one after its last, its row in
    `borders`, if it has one."""
    if VARLEN:
        p = segments + 4 * i
        i_n, begin, stop, row = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    else:
        i_n = i // NSEG
        begin = i % NSEG * SEG
        stop = tl.minimum(begin + SEG, NT)
        row = i
    return i_n, begin, stop, row


@triton.jit
def sequence_at(i_n, cu_seqlens, tile_base, chunk_base, T, NT, NC, BT: tl.constexpr, VARLEN: tl.constexpr):
    """Of a sequence: its first row (64 bits), its length, its first tile, how many it has, its first chunk."""
    if VARLEN:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
        n_tiles = tl.cdiv(length, BT)
        t_base = tl.load(tile_base + i_n)
        c_base = tl.load(chunk_base + i_n)
    else:
        first = i_n.to(tl.int64) * T
        length = T
        n_tiles = NT
        t_base = i_n * NT
        c_base = i_n * NC
    return first, length, t_base, n_tiles, c_base


@triton.jit
def entering(
    start, borders, i_n, row, begin, stop, n_tiles, i_b, HB, KV,
    REVERSE: tl.constexpr, HAS_START: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Where the state `[K, V]` is that a segment begins with, and whether it isn't zero: between segments it comes from
    `borders` `[rows, HB, K, V]`, at the sequence's border from start `[N, HB, K, V]`. Not CUT, all begin with start,
    from which those that look back go on."""
    inner = stop < n_tiles if REVERSE else begin > 0
    p, known = 0, True
    if HAS_START:
        p = start + (i_n.to(tl.int64) * HB + i_b) * KV
        if CUT:  # noqa: SIM102 (known when compiled, which the next isn't)
            if inner:
                p = borders + (row.to(tl.int64) * HB + i_b) * KV
    elif CUT:
        p, known = borders + (row.to(tl.int64) * HB + i_b) * KV, inner
    return p, known
