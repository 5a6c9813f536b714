"""Packed sequences: where each one's tiles, chunks and segments lie, found on the device in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

AT_ONCE = tl.constexpr(256)  # sequences, or tiles, that a program looks at together


@triton.jit
def cuts(tiles, SEG, LONG, TPC: tl.constexpr):
    """Into how many segments of about SEG tiles so many tiles are cut if they are more than LONG, and how many of them,
    whole chunks, each has; then how many the first has."""
    each = tl.cdiv(tiles, tl.where(tiles > LONG, tl.maximum((tiles + SEG // 2) // SEG, 1), 1))
    each = tl.cdiv(each, TPC) * TPC
    return tl.maximum(tl.cdiv(tiles, tl.maximum(each, 1)), 1), each, tl.minimum(each, tiles)


@triton.jit(do_not_specialize=["N", "COUNT", "SEG", "LONG", "SEGMENTS", "ROOM"])
def packing_kernel(
    cu_seqlens, tiles, tile_base, chunk_base, segments, own_segments, N, COUNT, SEG, LONG, SEGMENTS, ROOM,
    BT: tl.constexpr, TPC: tl.constexpr,
):  # fmt: skip
    """Of N sequences: tiles `[COUNT, 4]`, int64, every tile's place in its sequence, the sequence's first row and
    length, and the tile's chunk. int32: tile_base, chunk_base `[N]`, each one's first; segments `[SEGMENTS, 4]`, the
    sequence, the first tile and the one after the last of what one program of a scan takes, and its row in `borders`,
    which has one for each segment of sequences that are cut; own_segments `[N, 3]`, each one's first segment, how many
    it has, and the first one's row.

    Sequences longer than LONG tiles are cut into several segments, for which `borders` has ROOM. The longest segments
    come first, so that none begins when the others are done. Past the last tile the tables name tiles past the end of
    the last sequence, and segments of sequence −1, whose programs return at once. Offsets that don't rise are the
    caller's error, but nothing is written outside of the tables. Grid: N.
    """
    i_n = tl.program_id(0)
    first = tl.load(cu_seqlens + i_n).to(tl.int64)
    own = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
    o_i = tl.arange(0, AT_ONCE)
    zero = tl.zeros([AT_ONCE], dtype=tl.int32)
    n_tiles = tl.cdiv(own, BT)
    count, each, longest = cuts(n_tiles, SEG, LONG, TPC)
    tiles_before, chunks_before, longer, segments_before, segments_all, rows_before = zero, zero, zero, zero, zero, zero
    for i in range(0, N, AT_ONCE):
        o_n = i + o_i
        m_n = o_n < N
        other = tl.load(cu_seqlens + o_n + 1, mask=m_n, other=0) - tl.load(cu_seqlens + o_n, mask=m_n, other=0)
        other = other.to(tl.int32)
        o_tiles = tl.cdiv(other, BT)
        before = m_n & (o_n < i_n)
        tiles_before += tl.where(before, o_tiles, 0)
        chunks_before += tl.where(before, tl.cdiv(o_tiles, TPC), 0)
        o_count, _each, o_longest = cuts(o_tiles, SEG, LONG, TPC)
        ahead = m_n & ((o_longest > longest) | ((o_longest == longest) & before))
        longer += ahead.to(tl.int32)
        segments_before += tl.where(ahead, o_count, 0)
        rows_before += tl.where(ahead & (o_count > 1), o_count, 0)
        segments_all += tl.where(m_n, o_count, 0)
    base, chunk = tl.sum(tiles_before), tl.sum(chunks_before)
    segment, row = tl.sum(segments_before), tl.sum(rows_before)
    tl.store(tile_base + i_n, base)
    tl.store(chunk_base + i_n, chunk)
    end = COUNT if i_n == N - 1 else base + n_tiles
    for i in range(base, end, AT_ONCE):
        o_t = i + o_i
        m_t = (o_t < end) & (o_t < COUNT) & (o_t >= 0)
        p_t = tiles + o_t.to(tl.int64) * 4
        tl.store(p_t, (o_t - base).to(tl.int64), mask=m_t)
        tl.store(p_t + 1, first + zero, mask=m_t)
        tl.store(p_t + 2, (own + zero).to(tl.int64), mask=m_t)
        tl.store(p_t + 3, (chunk + (o_t - base) // TPC).to(tl.int64), mask=m_t)
    has_room = (count == 1) | (row + count <= ROOM)
    tl.store(own_segments + 3 * i_n, segment)
    tl.store(own_segments + 3 * i_n + 1, tl.where(has_room, count, 0))
    tl.store(own_segments + 3 * i_n + 2, row)
    for i in range(0, count, AT_ONCE):
        o_s = i + o_i
        m_s = (o_s < count) & (segment + o_s < SEGMENTS)
        p_s = segments + 4 * (segment + o_s)
        tl.store(p_s, zero + tl.where(has_room, i_n, -1), mask=m_s)
        tl.store(p_s + 1, o_s * each, mask=m_s)
        tl.store(p_s + 2, tl.minimum(o_s * each + each, n_tiles), mask=m_s)
        tl.store(p_s + 3, row + o_s, mask=m_s)
    if i_n == N - 1:  # the rest of 16 bytes, so that nothing of the memory is left as it was
        o_e = tl.arange(0, 4)
        m_e, m_o = N + o_e < tl.cdiv(N, 4) * 4, 3 * N + o_e < tl.cdiv(3 * N, 4) * 4
        tl.store(tile_base + N + o_e, o_e * 0, mask=m_e)
        tl.store(chunk_base + N + o_e, o_e * 0, mask=m_e)
        tl.store(own_segments + 3 * N + o_e, o_e * 0, mask=m_o)
    if tl.sum(longer) == N - 1:  # the last
        for i in range(tl.sum(segments_all), SEGMENTS, AT_ONCE):
            tl.store(segments + 4 * (i + o_i), zero - 1, mask=i + o_i < SEGMENTS)
