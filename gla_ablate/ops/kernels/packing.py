"""Packed sequences: where each one's tiles, chunks and segments lie, found on the device in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

AT_ONCE = tl.constexpr(256)  # sequences, or tiles, that a program looks at together


@triton.jit
def cuts(tiles, SEG, TPC: tl.constexpr):
    """Into how many segments of about SEG tiles so many tiles are cut, and how many of them, whole chunks, each has."""
    each = tl.cdiv(tiles, tl.maximum((tiles + SEG // 2) // SEG, 1))
    each = tl.cdiv(each, TPC) * TPC
    return tl.maximum(tl.cdiv(tiles, tl.maximum(each, 1)), 1), each


@triton.jit(do_not_specialize=["N", "COUNT", "SEG", "SEGMENTS", "ROOM"])
def packing_kernel(
    cu_seqlens, tiles, tile_base, chunk_base, segments, own_segments, N, COUNT, SEG, SEGMENTS, ROOM,
    BT: tl.constexpr, TPC: tl.constexpr,
):  # fmt: skip
    """Of N sequences, all int32: tiles `[COUNT, 2]`, the sequence and the place in it of every tile; tile_base,
    chunk_base `[N]`, each one's first; segments `[SEGMENTS, 3]`, the sequence, the first tile and the one after the
    last of what one program of a scan takes; own_segments `[N, 2]`, each one's first segment and how many it has.

    Sequences much longer than SEG tiles are cut into several segments. Those of the longest come first, so that none
    begins when the others are done; the first ROOM hold all of those that are cut. Past the last tile the tables name
    tiles past the end of the last sequence, and segments of sequence −1, whose programs return at once. Offsets that
    don't rise are the caller's error, but nothing is written outside of the tables. Grid: N.
    """
    i_n = tl.program_id(0)
    own = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int32)
    o_i = tl.arange(0, AT_ONCE)
    zero = tl.zeros([AT_ONCE], dtype=tl.int32)
    tiles_before, chunks_before, longer, segments_before, segments_all = zero, zero, zero, zero, zero
    for i in range(0, N, AT_ONCE):
        o_n = i + o_i
        m_n = o_n < N
        other = tl.load(cu_seqlens + o_n + 1, mask=m_n, other=0) - tl.load(cu_seqlens + o_n, mask=m_n, other=0)
        other = other.to(tl.int32)
        n_tiles = tl.cdiv(other, BT)
        before = m_n & (o_n < i_n)
        tiles_before += tl.where(before, n_tiles, 0)
        chunks_before += tl.where(before, tl.cdiv(n_tiles, TPC), 0)
        ahead = m_n & ((other > own) | ((other == own) & before))
        count, _each = cuts(n_tiles, SEG, TPC)
        longer += ahead.to(tl.int32)
        segments_before += tl.where(ahead, count, 0)
        segments_all += tl.where(m_n, count, 0)
    base, segment = tl.sum(tiles_before), tl.sum(segments_before)
    n_tiles = tl.cdiv(own, BT)
    tl.store(tile_base + i_n, base)
    tl.store(chunk_base + i_n, tl.sum(chunks_before))
    end = COUNT if i_n == N - 1 else base + n_tiles
    for i in range(base, end, AT_ONCE):
        o_t = i + o_i
        m_t = (o_t < end) & (o_t < COUNT) & (o_t >= 0)
        tl.store(tiles + 2 * o_t, zero + i_n, mask=m_t)
        tl.store(tiles + 2 * o_t + 1, o_t - base, mask=m_t)
    count, each = cuts(n_tiles, SEG, TPC)
    has_room = (count == 1) | (segment + count <= ROOM)
    tl.store(own_segments + 2 * i_n, segment)
    tl.store(own_segments + 2 * i_n + 1, tl.where(has_room, count, 0))
    for i in range(0, count, AT_ONCE):
        o_s = i + o_i
        m_s = (o_s < count) & (segment + o_s < SEGMENTS)
        p_s = segments + 3 * (segment + o_s)
        tl.store(p_s, zero + tl.where(has_room, i_n, -1), mask=m_s)
        tl.store(p_s + 1, o_s * each, mask=m_s)
        tl.store(p_s + 2, tl.minimum(o_s * each + each, n_tiles), mask=m_s)
    if tl.sum(longer) == N - 1:  # the shortest
        for i in range(tl.sum(segments_all), SEGMENTS, AT_ONCE):
            tl.store(segments + 3 * (i + o_i), zero - 1, mask=i + o_i < SEGMENTS)
