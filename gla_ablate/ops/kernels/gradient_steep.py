r"""Gates on channels that are steep: the gradients of tiles that `channel_gradient_kernel` leaves out.

A program takes half a tile (`BS` of its `BT` rows), so that it holds half as much at a time. Of the other half it needs
what crosses from one to the other: pairs (i, j) of a row i in the later and j in the earlier half meet at the border
between them, where both exponents are ≤ 0, so to either half the other is what `x` and `y` are to a tile. Inside a half
the same goes on down to blocks, whose rows meet about the block's centre; there alone an exponent may be positive, and
steps are cut at BOUND. How dg is summed is told in `gla_ablate.ops.kernels.gradient`; for fp32 inputs (EXACT) the sums
at levels above blocks go outward from each anchor, so that they hold crossing pairs alone. dA is in one half of 16 bits
above blocks, from which both sides of a pair take it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import across, beside, chunk_of, locate, store
from gla_ablate.ops.kernels.decay import (
    about_blocks,
    between,
    collected,
    floored,
    gates,
    is_later,
    matrices,
    some_steep,
    summed,
)
from gla_ablate.ops.kernels.parts import parts, product, turned


@triton.jit
def meetings(b_a, level: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """The pairs of dA that meet at each level of the tree, from blocks on; one tile of no use if there is no level."""
    one = (tl.where(between(BLOCK << level, b_a.shape[0]), b_a, 0.0).to(DTYPE),)
    if level + 1 >= INNER:
        return one
    else:
        return one + meetings(b_a, level + 1, INNER, BLOCK, DTYPE)


@triton.jit
def met(b_q, b_k, g_parts, outer, take, level: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
        DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """From `level` on: Σ dA k under the decay between them in the later halves, what they read from the earlier; Σ dA q
    in the earlier. One tile holds both factors, each with the decay to where the halves meet."""
    later = is_later(BLOCK << level, outer[0].shape[0])
    b_e = tl.exp2(summed(g_parts, take[level + 3]))
    b_f = tl.where(later, b_q, b_k).to(tl.float32) * b_e
    zero = tl.zeros(b_f.shape, dtype=tl.float32)
    one = (product(parts(b_f, DTYPE), (outer[level],), zero, PRECISION) * b_e,)
    if level + 1 >= INNER:
        return one
    else:
        return one + met(b_q, b_k, g_parts, outer, take, level + 1, INNER, BLOCK, DTYPE, PRECISION)


@triton.jit
def pairs_of(da, tile, j, i, N: tl.constexpr, BT: tl.constexpr):
    """dAᵀ `[N, N]` of N rows from j on (what is read) with N from i on (what reads), fp32."""
    o_i = tl.arange(0, N)
    return tl.load(da + tile * BT * BT + (j + o_i[:, None]) * BT + i + o_i[None, :])


@triton.jit
def half_tile(
    q, k, g, halves, x, y, da, flow, dq, dk, dg, sums, tile, tile_q, chunk, first, i_s, i_r, length, i_q, hard,
    scale, H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, BLOCK: tl.constexpr, BOUND: tl.constexpr, INNER: tl.constexpr, LATE: tl.constexpr,
    STAGES: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, ALL: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg of the later or the earlier BS rows; of all if BS is BT. hard: whether the tile has steps below
    BOUND; ALL: not dq alone."""
    HALVED: tl.constexpr = BS < BT
    HQ: tl.constexpr = H * GROUP
    i_h = i_q // GROUP
    own: tl.constexpr = BS if LATE else 0
    other: tl.constexpr = 0 if LATE else BS
    o_i = tl.arange(0, BS)
    o_t = i_s * BT + o_i
    m_t, m_p = o_t + own < length, o_t + other < length
    row, row_p = first + i_s * BT + own, first + i_s * BT + other
    # what x brings still needs `scale`, what pairs bring has it from here on
    b_a = pairs_of(da, tile_q, own, own, BS, BT) * scale
    b_self = tl.load(da + tile_q * BT * BT + (own + o_i) * (BT + 1))[None, :] * scale
    upper = o_i[:, None] < o_i[None, :]
    inner = parts(tl.where(upper & (o_i[:, None] // BLOCK == o_i[None, :] // BLOCK), b_a, 0.0), DTYPE)
    # both ways round: a product takes its pairs from one side or the other
    b_at = tl.load(da + tile_q * BT * BT + (own + o_i[None, :]) * BT + own + o_i[:, None]) * scale
    outer = meetings(tl.where(upper, b_a, b_at), 0, INNER, BLOCK, DTYPE)
    if HALVED:
        cross = parts(pairs_of(da, tile_q, 0, BS, BS, BT) * scale, DTYPE)
    take = matrices(sums, 0, INNER + 3, BS, BT)
    zero = tl.zeros([BK, BS], dtype=tl.float32)
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col, col_k, row_x = i_q * K + i_k * BK, i_h * K + i_k * BK, chunk * K + i_k * BK
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        early = tl.load(halves + 2 * tile * K + o_k, mask=m_k, other=0.0)
        late = tl.load(halves + (2 * tile + 1) * K + o_k, mask=m_k, other=0.0)
        if ALL:
            passed = tl.load(flow + tile_q * K + o_k, mask=m_k, other=0.0) * early * late
        # what rows find at the border that they read from, and leave at the one that they write to
        b_x = beside(x, row_x, i_r + own, R, m_k, m_t, DESC, WHOLE).to(tl.float32) * scale
        if ALL:
            b_y = beside(y, row_x, i_r + own, R, m_k, m_t, DESC, WHOLE).to(tl.float32)
        if HALVED:
            b_g = floored(gates(g, row_p, col_k, H * K, m_p, m_k, DESC, WHOLE), hard)
            g_parts = parts(b_g, DTYPE)
            if LATE:
                b_x *= early[:, None]
                b_f = across(k, row_p, col_k, H * K, m_p, m_k, DESC, WHOLE).to(tl.float32)
                b_f *= tl.exp2(summed(g_parts, take[1]))
                b_x += product(parts(b_f, DTYPE), cross, zero, PRECISION)
                if ALL:
                    b_p = beside(y, row_x, i_r + other, R, m_k, m_p, DESC, WHOLE).to(tl.float32)
                    passed += tl.sum(b_f * b_p, axis=1) * late
            elif ALL:
                b_y *= late[:, None]
                b_f = across(q, row_p, col, HQ * K, m_p, m_k, DESC, WHOLE).to(tl.float32)
                b_f *= tl.exp2(summed(g_parts, take[0]))
                b_y += product(parts(b_f, DTYPE), turned(cross), zero, PRECISION)
                b_p = beside(x, row_x, i_r + other, R, m_k, m_p, DESC, WHOLE).to(tl.float32)
                passed += tl.sum(b_f * b_p, axis=1) * early * scale
        b_g = floored(gates(g, row, col_k, H * K, m_t, m_k, DESC, WHOLE), hard)
        g_parts = parts(b_g, DTYPE)
        b_x *= tl.exp2(summed(g_parts, take[0]))
        if ALL:
            b_y *= tl.exp2(summed(g_parts, take[1]))
        b_k = across(k, row, col_k, H * K, m_t, m_k, DESC, WHOLE)
        b_q = across(q, row, col, HQ * K, m_t, m_k, DESC, WHOLE) if ALL else b_k

        # over row t: what is read from it on, less what its own half wrote from it on; what leaves from before it
        if ALL:
            b_dg = collected(parts(b_k.to(tl.float32) * b_y, DTYPE), take[1]) + passed[:, None]
        b_l = zero
        if INNER > 0:
            b_w = met(b_q, b_k, g_parts, outer, take, 0, INNER, BLOCK, DTYPE, PRECISION)
            b_z = b_q.to(tl.float32) * b_x if EXACT else zero
            for level in tl.static_range(INNER):
                later = is_later(BLOCK << level, BS)
                b_x += tl.where(later, b_w[level], 0.0)
                b_l += tl.where(later, 0.0, b_w[level])
                if EXACT and ALL:
                    b_p = tl.where(later, b_q, b_k) * b_w[level]
                    b_dg += collected(parts(b_p, DTYPE), take[level + 3])
            if not EXACT:
                b_z = b_q.to(tl.float32) * b_x - b_k.to(tl.float32) * b_l
        else:
            b_z = b_q.to(tl.float32) * b_x
        if ALL:
            b_dg += collected(parts(b_z, DTYPE), take[0])
            b_l += b_y

        # pairs inside blocks
        d = about_blocks(g_parts, take[2], hard, BOUND)
        b_k = b_k.to(tl.float32)
        b_w = product(parts(b_k * tl.exp2(-d), DTYPE), inner, zero, PRECISION) * tl.exp2(d)
        store(dq, tl.trans(b_x + b_w + b_self * b_k), row, col, HQ * K, m_t, m_k, DESC and WHOLE)
        if ALL:
            b_q = b_q.to(tl.float32)
            b_z = b_q * b_w
            b_w = product(parts(b_q * tl.exp2(d), DTYPE), turned(inner), zero, PRECISION) * tl.exp2(-d)
            store(dk, tl.trans(b_l + b_w + b_self * b_q), row, col, HQ * K, m_t, m_k, DESC and WHOLE)
            b_z -= b_k * b_w
            # outward from the centre, like the decay; where a step was cut, the pairs across it were too heavy
            b_z = collected(parts(b_z, DTYPE), take[2])
            if hard:
                b_z *= tl.exp2(tl.minimum(b_g - BOUND, 0.0))
            b_dg += b_z
            store(dg, tl.trans(b_dg), row, col, HQ * K, m_t, m_k, DESC and WHOLE)


@triton.jit(do_not_specialize=["T", "NT", "NC", "COUNT"])
def steep_gradient_kernel(
    q, k, g, halves, x, y, da, flow, dq, dk, dg, steep, sums, tiles, scale, T, NT, NC, COUNT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, TPC: tl.constexpr,
    BK: tl.constexpr, BLOCK: tl.constexpr, BOUND: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    ALL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg `[B, T, HQ, K]` of tiles marked steep, from what `channel_gradient_kernel` takes. A program takes half
    of each of SPAN tiles, one after the other. Grid: BT/BS · tiles/SPAN · HQ, the earlier halves first, for the code of
    both ways is more than a multiprocessor keeps at hand."""
    HQ: tl.constexpr = H * GROUP
    N: tl.constexpr = BT // BS
    R: tl.constexpr = TPC * BT
    pid = tl.program_id(0)
    per = tl.num_programs(0) // N
    i_e, i_q, begin = pid // per, pid % HQ, pid % per // HQ * SPAN
    i_h = i_q // GROUP
    if not some_steep(steep, begin, i_h, COUNT, H, SPAN):
        return
    # nothing is kept from one tile to the next: there are no registers to keep it in
    for i in tl.range(0, tl.minimum(COUNT - begin, SPAN), num_stages=1, disable_licm=True):
        i_t = begin + i
        i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
        tile, tile_q = i_t.to(tl.int64) * H + i_h, i_t.to(tl.int64) * HQ + i_q
        mark = tl.load(steep + tile)
        if (i_s * BT < length) & (mark != 0):
            hard = mark > 1
            chunk, i_r = chunk_of(i_t, i_s, tiles, NT, NC, TPC, VARLEN) * HQ + i_q, i_s % TPC * BT
            if N == 1 or i_e == 0:
                half_tile(
                    q, k, g, halves, x, y, da, flow, dq, dk, dg, sums, tile, tile_q, chunk, first, i_s, i_r, length,
                    i_q, hard, scale, H, GROUP, K, BT, BS, R, BK, BLOCK, BOUND, INNER, False, STAGES, DESC, WHOLE,
                    EXACT, ALL, DTYPE, PRECISION,
                )  # fmt: skip
            if N > 1 and i_e > 0:  # as `else` the two ways at times don't share memory, and a program less fits
                half_tile(
                    q, k, g, halves, x, y, da, flow, dq, dk, dg, sums, tile, tile_q, chunk, first, i_s, i_r, length,
                    i_q, hard, scale, H, GROUP, K, BT, BS, R, BK, BLOCK, BOUND, INNER, True, STAGES, DESC, WHOLE,
                    EXACT, ALL, DTYPE, PRECISION,
                )  # fmt: skip
