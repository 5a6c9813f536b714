r"""Gates on channels that are steep: the gradients of tiles that `channel_gradient_kernel` leaves out.

A program takes half a tile (`BS` of its `BT` rows), so that it holds half as much at a time. Of the other half it needs
what crosses from one to the other: pairs (i, j) of a row i in the later and j in the earlier half meet at the border
between them, where both exponents are ≤ 0, so to either half the other is what `x` and `y` are to a tile. Inside a half
the same goes on with blocks (`gla_ablate.ops.kernels.blocks`). How dg is summed is told in
`gla_ablate.ops.kernels.gradient`; here only pairs on one side of a block's centre have to cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.blocks import masked_blocks, two_blocks
from gla_ablate.ops.kernels.common import across, beside, chunk_of, locate, store
from gla_ablate.ops.kernels.decay import between, floored, gates, matrices, some_steep, summed
from gla_ablate.ops.kernels.parts import parts, product, turned


@triton.jit
def pairs_of(da, tile, j, i, N: tl.constexpr, BT: tl.constexpr):
    """dAᵀ `[N, N]` of N rows from j on (what is read) with N from i on (what reads), fp32."""
    o_i = tl.arange(0, N)
    return tl.load(da + tile * BT * BT + (j + o_i[:, None]) * BT + i + o_i[None, :])


@triton.jit
def half_tile(
    q, k, g, g_rows, halves, x, y, da, flow, dq, dk, dg, sums, tile, tile_q, chunk, first, i_s, i_r, length, i_q, hard,
    scale, H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, BLOCK: tl.constexpr, BOUND: tl.constexpr, INNER: tl.constexpr, TWO: tl.constexpr,
    LATE: tl.constexpr, STAGES: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr, ALL: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg of the later or the earlier BS rows; of all if BS is BT. hard: whether the tile has steps below
    BOUND; ALL: not dq alone."""
    HALVED: tl.constexpr = BS < BT
    HQ: tl.constexpr = H * GROUP
    i_h = i_q // GROUP
    own: tl.constexpr = BS if LATE else 0
    other: tl.constexpr = 0 if LATE else BS
    o_i, o_b = tl.arange(0, BS), tl.arange(0, BLOCK)
    o_t = i_s * BT + o_i
    m_t, m_p = o_t + own < length, o_t + other < length
    m_1, m_2 = i_s * BT + o_b + own < length, i_s * BT + o_b + own + BLOCK < length
    row, row_p = first + i_s * BT + own, first + i_s * BT + other
    # all are loaded before any is waited for. What x brings still needs `scale`, what pairs bring has it from here on
    b_self = tl.load(da + tile_q * BT * BT + (own + o_i) * (BT + 1))[None, :]
    if HALVED:
        b_c = pairs_of(da, tile_q, 0, BS, BS, BT)
    take = matrices(sums, 0, 2, BS, BT)
    if TWO:
        b_1, b_2 = pairs_of(da, tile_q, own, own, BLOCK, BT), pairs_of(da, tile_q, own + BLOCK, own + BLOCK, BLOCK, BT)
        b_3 = pairs_of(da, tile_q, own, own + BLOCK, BLOCK, BT)
        inner_take = matrices(sums, 0, 3, BLOCK, BT)
        below = o_b[:, None] < o_b[None, :]
        b_1, b_2 = tl.where(below, b_1, 0.0), tl.where(below, b_2, 0.0)
        pairs = (parts(b_1 * scale, DTYPE), parts(b_2 * scale, DTYPE), parts(b_3 * scale, DTYPE))
    else:
        b_a = pairs_of(da, tile_q, own, own, BS, BT) * scale
        b_at = tl.load(da + tile_q * BT * BT + (own + o_i[None, :]) * BT + own + o_i[:, None]) * scale
        inner_take = matrices(sums, 0, INNER + 3, BS, BT)
        upper = o_i[:, None] < o_i[None, :]
        pairs = (
            parts(tl.where(upper & (o_i[:, None] // BLOCK == o_i[None, :] // BLOCK), b_a, 0.0), DTYPE),
            parts(tl.where(between(BLOCK, BS), tl.where(upper, b_a, b_at), 0.0), DTYPE),  # both ways round
        )
    if HALVED:
        cross = parts(b_c * scale, DTYPE)
    b_self *= scale
    zero = tl.zeros([BK, BS], dtype=tl.float32)
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col, col_k, row_x = i_q * K + i_k * BK, i_h * K + i_k * BK, chunk * K + i_k * BK
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        early = tl.load(halves + 2 * tile * K + o_k, mask=m_k, other=0.0)
        late = tl.load(halves + (2 * tile + 1) * K + o_k, mask=m_k, other=0.0)
        b_y, passed = zero, tl.zeros([BK], dtype=tl.float32)  # for dq alone, which takes neither
        if ALL:
            passed = tl.load(flow + tile_q * K + o_k, mask=m_k, other=0.0) * early * late
        # what rows find at the border that they read from, and leave at the one that they write to
        b_x = beside(x, row_x, i_r + own, R, m_k, m_t, DESC, WHOLE).to(tl.float32)
        b_x *= (early * scale)[:, None] if HALVED and LATE else scale
        if ALL:
            b_y = beside(y, row_x, i_r + own, R, m_k, m_t, DESC, WHOLE).to(tl.float32)
        if HALVED:
            b_g = floored(gates(g, row_p, col_k, H * K, m_p, m_k, DESC, WHOLE))
            g_parts = parts(b_g, DTYPE)
            if LATE:
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
        b_g = floored(gates(g, row, col_k, H * K, m_t, m_k, DESC, WHOLE))
        b_k = across(k, row, col_k, H * K, m_t, m_k, DESC, WHOLE).to(tl.float32)
        b_q = across(q, row, col, HQ * K, m_t, m_k, DESC, WHOLE).to(tl.float32) if ALL else b_k
        if TWO:
            b_u, b_l, b_dg = two_blocks(
                b_q, b_k, b_x, b_y, b_g, passed[:, None], pairs, inner_take, hard, g_rows, row, col_k, H * K, m_1, m_2,
                m_k, BOUND, WHOLE, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            b_u, b_l, b_dg = masked_blocks(
                b_q, b_k, b_x, b_y, b_g, passed[:, None], pairs, inner_take, hard, g_rows, row, col_k, H * K, m_t, m_k,
                BLOCK, BOUND, INNER, WHOLE, DTYPE, PRECISION,
            )  # fmt: skip
        store(dq, tl.trans(b_u + b_self * b_k), row, col, HQ * K, m_t, m_k, DESC and WHOLE)
        if ALL:
            store(dk, tl.trans(b_l + b_self * b_q), row, col, HQ * K, m_t, m_k, DESC and WHOLE)
            store(dg, tl.trans(b_dg), row, col, HQ * K, m_t, m_k, DESC and WHOLE)


@triton.jit(do_not_specialize=["T", "NT", "NC", "COUNT"])
def steep_gradient_kernel(
    q, k, g, g_rows, halves, x, y, da, flow, dq, dk, dg, steep, sums, tiles, scale, T, NT, NC, COUNT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, TPC: tl.constexpr,
    BK: tl.constexpr, BLOCK: tl.constexpr, BOUND: tl.constexpr, INNER: tl.constexpr, TWO: tl.constexpr,
    SPAN: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr,
    ALL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg `[B, T, HQ, K]` of tiles marked steep, from what `channel_gradient_kernel` takes. A program takes half
    of each of SPAN tiles, one after the other. Grid: BT/BS · tiles/SPAN · HQ, the earlier halves first, for the code of
    both ways is more than a multiprocessor keeps at hand.

    g_rows: g as a pointer, whatever g is. INNER: half a tile is two blocks of rows; TWO: each of them is as much as
    matrix units take."""
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
                    q, k, g, g_rows, halves, x, y, da, flow, dq, dk, dg, sums, tile, tile_q, chunk, first, i_s, i_r,
                    length, i_q, hard, scale, H, GROUP, K, BT, BS, R, BK, BLOCK, BOUND, INNER, TWO, False, STAGES,
                    DESC, WHOLE, ALL, DTYPE, PRECISION,
                )  # fmt: skip
            if N > 1 and i_e > 0:  # as `else` the two ways at times don't share memory, and a program less fits
                half_tile(
                    q, k, g, g_rows, halves, x, y, da, flow, dq, dk, dg, sums, tile, tile_q, chunk, first, i_s, i_r,
                    length, i_q, hard, scale, H, GROUP, K, BT, BS, R, BK, BLOCK, BOUND, INNER, TWO, True, STAGES,
                    DESC, WHOLE, ALL, DTYPE, PRECISION,
                )  # fmt: skip
