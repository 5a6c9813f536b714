"""Packed sequences: where each one's tiles and chunks lie, found on the device in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

AT_ONCE = tl.constexpr(256)  # sequences, or tiles, that a program looks at together


@triton.jit(do_not_specialize=["N", "COUNT"])
def packing_kernel(
    cu_seqlens, tiles, tile_base, chunk_base, order, N, COUNT, BT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Of N sequences: tiles `[COUNT, 2]`, the sequence and the place in it of every tile; tile_base, chunk_base `[N]`,
    each one's first; order `[N]`, the sequences from the longest on, so that none begins when the others are done. All
    int32.

    Past the last tile the table names tiles past the end of the last sequence, whose programs return at once.
    Grid: N.
    """
    i_n = tl.program_id(0)
    own = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int32)
    o_i = tl.arange(0, AT_ONCE)
    tiles_before = tl.zeros([AT_ONCE], dtype=tl.int32)
    chunks_before, rank = tiles_before, tiles_before
    for i in range(0, N, AT_ONCE):
        o_n = i + o_i
        m_n = o_n < N
        other = tl.load(cu_seqlens + o_n + 1, mask=m_n, other=0) - tl.load(cu_seqlens + o_n, mask=m_n, other=0)
        other = other.to(tl.int32)
        before = o_n < i_n
        tiles_before += tl.where(before, (other + BT - 1) // BT, 0)
        chunks_before += tl.where(before, (other + CHUNK - 1) // CHUNK, 0)
        rank += (m_n & ((other > own) | ((other == own) & before))).to(tl.int32)
    base = tl.sum(tiles_before)
    tl.store(tile_base + i_n, base)
    tl.store(chunk_base + i_n, tl.sum(chunks_before))
    tl.store(order + tl.sum(rank), i_n)
    end = COUNT if i_n == N - 1 else base + (own + BT - 1) // BT
    for i in range(base, end, AT_ONCE):
        o_t = i + o_i
        m_t = (o_t < end) & (o_t < COUNT)
        tl.store(tiles + 2 * o_t, o_t * 0 + i_n, mask=m_t)
        tl.store(tiles + 2 * o_t + 1, o_t - base, mask=m_t)
