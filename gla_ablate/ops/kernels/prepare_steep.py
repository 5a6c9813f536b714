"""Gates on channels that are steep: what `prepare_kernel` leaves out.

Rows of the two halves of a tile meet at the border between them, rows of the two blocks of a half at that between
those, and rows of a block about its centre, where alone an exponent may be positive and steps are cut at BOUND. A
program takes half a tile (`BS` of its `BT` rows), so that it holds half as much at a time, and several run side by
side; the one of the later half makes the scores between the halves, too. Factors of a score are in two halves of 16
bits where rows of one block meet, which weigh most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import across, locate, store
from gla_ablate.ops.kernels.decay import (
    about_block,
    about_blocks,
    between,
    floored,
    gates,
    half_sums,
    is_later,
    matrices,
    some_steep,
    summed,
    through,
)
from gla_ablate.ops.kernels.parts import apart, parts, product, together, turned
from gla_ablate.ops.kernels.prepare import keep_decay


@triton.jit
def block_scores(b_q, b_k, d, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc and what pairs inside a block add to it, with the decay d to its centre."""
    return product(turned(parts(b_q * tl.exp2(d), DTYPE)), parts(b_k * tl.exp2(-d), DTYPE), acc, PRECISION)


@triton.jit
def two_block_scores(b_q, b_k, b_g, take, acc_1, acc_2, acc, hard, BOUND: tl.constexpr, DTYPE: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """q and k of two blocks with the decay to the borders of both, what both let through, and what the scores get of
    the earlier block, of the later, of the later with the earlier."""
    q_1, q_2 = apart(b_q)
    k_1, k_2 = apart(b_k)
    g_1, g_2 = apart(b_g)
    p_1, p_2 = parts(g_1, DTYPE), parts(g_2, DTYPE)
    e_1, e_2 = tl.exp2(summed(p_1, take[0])), tl.exp2(summed(p_2, take[0]))
    early, late = through(e_1), through(e_2)
    r_1, r_2 = q_1 * e_1, q_2 * e_2
    w_1, w_2 = k_1 * tl.exp2(summed(p_1, take[1])), k_2 * tl.exp2(summed(p_2, take[1]))
    d_1, d_2 = about_blocks(p_1, p_2, take[2], hard, BOUND)
    acc = tl.dot(tl.trans(r_2.to(DTYPE)), w_1.to(DTYPE), acc, input_precision=PRECISION)
    acc_1 = block_scores(q_1, k_1, d_1, acc_1, DTYPE, PRECISION)
    acc_2 = block_scores(q_2, k_2, d_2, acc_2, DTYPE, PRECISION)
    b_p, b_s = together(r_1, r_2 * early[:, None]), together(w_1 * late[:, None], w_2)
    return b_p, b_s, early * late, acc_1, acc_2, acc


@triton.jit
def half_scores(
    q, k, g, qg, kg, decay, halves, scores, steep, sums, tile, tile_q, first, i_s, length, i_q, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BLOCK: tl.constexpr, BOUND: tl.constexpr, INNER: tl.constexpr, TWO: tl.constexpr, LATE: tl.constexpr,
    STAGES: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the later or the earlier BS rows; of all if BS is BT."""
    HQ: tl.constexpr = H * GROUP
    HALVED: tl.constexpr = BS < BT
    own: tl.constexpr = BS if LATE else 0
    other: tl.constexpr = 0 if LATE else BS
    i_h = i_q // GROUP
    o_i = tl.arange(0, BS)
    o_t = i_s * BT + o_i
    m_t, m_p = o_t + own < length, o_t + other < length
    m_i = o_i < BS
    row, row_p = first + i_s * BT + own, first + i_s * BT + other
    zero = tl.zeros([BS, BS], dtype=tl.float32)
    cross = zero
    if TWO:
        take, inner_take = matrices(sums, 0, 2, BS, BT), matrices(sums, 0, 3, BLOCK, BT)
        acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        acc_1, acc_2 = acc, acc
    else:
        take = matrices(sums, 0, INNER + 3, BS, BT)
        causal = o_i[:, None] >= o_i[None, :]
        acc = zero
    any_hard = 0
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col, col_q = i_h * K + i_k * BK, i_q * K + i_k * BK
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_g = gates(g, row, col, H * K, m_t, m_k, DESC, WHOLE)
        least = b_g
        if HALVED:
            b_o = gates(g, row_p, col, H * K, m_p, m_k, DESC, WHOLE)
            least = tl.minimum(b_g, b_o)
        hard = tl.min(least) < BOUND
        any_hard = tl.maximum(any_hard, hard.to(tl.int32))
        b_g = floored(b_g)
        b_q = across(q, row, col_q, HQ * K, m_t, m_k, DESC, WHOLE).to(tl.float32) * scale
        b_k = across(k, row, col, H * K, m_t, m_k, DESC, WHOLE).to(tl.float32)
        if TWO:
            b_p, b_s, here, acc_1, acc_2, acc = two_block_scores(
                b_q, b_k, b_g, inner_take, acc_1, acc_2, acc, hard, BOUND, DTYPE, PRECISION
            )
        else:
            g_parts = parts(b_g, DTYPE)
            b_p, b_s = b_q * tl.exp2(summed(g_parts, take[0])), b_k * tl.exp2(summed(g_parts, take[1]))
            here = tl.exp2(tl.sum(b_g, axis=1))
        if HALVED:
            b_o = floored(b_o)
            there = tl.exp2(tl.sum(b_o, axis=1))
            if LATE:
                b_f = across(k, row_p, col, H * K, m_p, m_k, DESC, WHOLE).to(tl.float32)
                b_f *= tl.exp2(summed(parts(b_o, DTYPE), take[1]))
                cross = tl.dot(tl.trans(b_p.to(DTYPE)), b_f.to(DTYPE), cross, input_precision=PRECISION)
                b_p *= there[:, None]
            else:
                b_s *= there[:, None]
            early, late = (there, here) if LATE else (here, there)
        else:
            early, late = half_sums(b_g)
            early, late = tl.exp2(early), tl.exp2(late)
        store(qg, tl.trans(b_p), tile_q * BT + own, i_k * BK, K, m_i, m_k, DESC)
        if i_q % GROUP == 0:
            store(kg, tl.trans(b_s), tile * BT + own, i_k * BK, K, m_i, m_k, DESC)
            if LATE or not HALVED:
                keep_decay(decay, halves, early, late, tile, o_k, K)
        if not TWO:
            if INNER > 0:
                # the later block with the earlier: one tile holds both factors, each with the decay to where they meet
                b_z = tl.where(is_later(BLOCK, BS), b_q, b_k) * tl.exp2(summed(g_parts, take[3]))
                b_a = tl.dot(tl.trans(b_z.to(DTYPE)), b_z.to(DTYPE), input_precision=PRECISION)
                acc += tl.where(causal & between(BLOCK, BS), b_a, 0.0)
            d = about_block(g_parts, take[2], hard, BOUND)
            b_a = block_scores(b_q, b_k, d, zero, DTYPE, PRECISION)
            acc += tl.where(causal & (o_i[:, None] // BLOCK == o_i[None, :] // BLOCK), b_a, 0.0)
    p_a = scores + tile_q * BT * BT + (own + o_i[:, None]) * BT + o_i[None, :]
    if TWO:
        o_b = tl.arange(0, BLOCK)
        down = o_b[:, None] >= o_b[None, :]
        p_b = scores + tile_q * BT * BT + (own + o_b[:, None]) * BT + own + o_b[None, :]
        tl.store(p_b, tl.where(down, acc_1, 0.0).to(scores.dtype.element_ty))
        tl.store(p_b + BLOCK, tl.zeros([BLOCK, BLOCK], dtype=scores.dtype.element_ty))
        tl.store(p_b + BLOCK * BT, acc.to(scores.dtype.element_ty))
        tl.store(p_b + BLOCK * BT + BLOCK, tl.where(down, acc_2, 0.0).to(scores.dtype.element_ty))
    else:
        tl.store(p_a + own, acc.to(scores.dtype.element_ty))
    if HALVED:
        tl.store(p_a + other, cross.to(scores.dtype.element_ty))  # zero above the diagonal
    if (i_q % GROUP == 0) & (any_hard > 0):
        tl.store(steep + tile, 2)


@triton.jit(do_not_specialize=["T", "NT", "COUNT"])
def steep_prepare_kernel(
    q, k, g, qg, kg, decay, halves, scores, steep, sums, tiles, scale, T, NT, COUNT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BLOCK: tl.constexpr, BOUND: tl.constexpr, INNER: tl.constexpr, TWO: tl.constexpr, SPAN: tl.constexpr,
    STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All that `prepare_kernel` gives, of tiles marked steep: of `steep` a 2 for those with steps below BOUND, which
    take a way of their own here and backward. A program takes half of each of SPAN tiles, one after the other. Grid:
    BT/BS · tiles/SPAN · HQ, see `steep_gradient_kernel`."""
    HQ: tl.constexpr = H * GROUP
    N: tl.constexpr = BT // BS
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
        if (i_s * BT < length) & (tl.load(steep + tile) != 0):
            if N == 1 or i_e == 0:
                half_scores(
                    q, k, g, qg, kg, decay, halves, scores, steep, sums, tile, tile_q, first, i_s, length, i_q, scale,
                    H, GROUP, K, BT, BS, BK, BLOCK, BOUND, INNER, TWO, False, STAGES, DESC, WHOLE, DTYPE, PRECISION,
                )  # fmt: skip
            if N > 1 and i_e > 0:
                half_scores(
                    q, k, g, qg, kg, decay, halves, scores, steep, sums, tile, tile_q, first, i_s, length, i_q, scale,
                    H, GROUP, K, BT, BS, BK, BLOCK, BOUND, INNER, TWO, True, STAGES, DESC, WHOLE, DTYPE, PRECISION,
                )  # fmt: skip
