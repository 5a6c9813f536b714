"""Gates on channels: q and k with the decay to their tile's borders, and the scores of each tile with itself.

Two kernels take the same tiles. Where the gates of a tile are mild, one anchor in its middle serves all its rows: no
exponent leaves the range of fp32, and a score is exp(d_i) q_i · exp(−d_j) k_j. `prepare_kernel` assumes it, finds out,
and marks the other tiles, which `steep_prepare_kernel` does over.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import locate
from gla_ablate.ops.kernels.decay import between, centred, inputs, is_later, matrices, parts, summed


@triton.jit(do_not_specialize=["T", "NT"])
def prepare_kernel(
    q, k, g, qg, kg, decay, halves, scores, steep, sums, cu_seqlens, tiles, scale, mild, T, NT,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """qg = scale · q · exp(prefix), kg = k · exp(suffix) `[tiles, H, BT, K]`, zero past a sequence's end; decay
    `[tiles, H, K]` and halves `[tiles, H, 2, K]`: what a whole tile and its halves let through; scores
    `[tiles, H, BT, BT]` of each tile with itself; steep `[tiles, H]`: whether a half decays by more than `mild` (log2),
    which leaves the scores to be done over. Grid: tiles · H.
    """
    pid = tl.program_id(0)
    i_h, i_t = pid % H, pid // H
    _i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    tile = i_t.to(tl.int64) * H + i_h
    take = matrices(sums, 0, 3, BT)
    acc = tl.zeros([BT, BT], dtype=tl.float32)
    beyond = tl.zeros([BT, BK], dtype=tl.int32)
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        o_k = i_k * BK + tl.arange(0, BK)
        _p, _m, b_g, b_q, b_k = inputs(q, k, g, first, o_t, length, i_h, o_k, scale, H, K)
        g_parts = parts(b_g, DTYPE)
        b_p = tl.exp2(summed(take[0], g_parts))
        b_s = tl.exp2(summed(take[1], g_parts))
        d = summed(take[2], g_parts)
        m_k = (o_k < K)[None, :]
        p_r = tile * BT * K + o_i[:, None] * K + o_k[None, :]
        tl.store(qg + p_r, (b_q * b_p).to(qg.dtype.element_ty), mask=m_k)
        tl.store(kg + p_r, (b_k * b_s).to(kg.dtype.element_ty), mask=m_k)
        middle = m_k & (o_i == BT // 2 - 1)[:, None]
        p_k = tile * K + o_i[:, None] * 0 + o_k[None, :]
        tl.store(decay + p_k, b_p, mask=m_k & (o_i == BT - 1)[:, None])
        tl.store(halves + tile * K + p_k, b_p, mask=middle)
        tl.store(halves + (tile + 1) * K + p_k, b_s, mask=middle)
        beyond |= (tl.abs(d) <= mild).to(tl.int32) ^ 1  # so that NaN is beyond
        b_e, b_f = (b_q * tl.exp2(d)).to(DTYPE), (b_k * tl.exp2(-d)).to(DTYPE)
        acc = tl.dot(b_e, tl.trans(b_f), acc, input_precision=PRECISION)
    acc = tl.where(o_i[:, None] >= o_i[None, :], acc, 0.0)
    tl.store(scores + tile * BT * BT + o_i[:, None] * BT + o_i[None, :], acc.to(scores.dtype.element_ty))
    tl.store(steep + tile, tl.max(tl.max(beyond, axis=1), axis=0))


@triton.jit
def empty(n: tl.constexpr, BT: tl.constexpr):
    one = (tl.zeros([BT, BT], dtype=tl.float32),)
    if n == 1:
        return one
    else:
        return one + empty(n - 1, BT)


@triton.jit
def halves(
    acc, b_q, b_k, g_parts, take, level: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the later half of every 2w rows with the earlier, w = BLOCK · 2^level, added to acc from `level` on.
    One tile holds both factors, each with the decay to the middle, both exponents ≤ 0."""
    if level == LEVELS:
        return ()
    else:
        later = is_later(BLOCK << level, b_q.shape[0])
        b_z = (tl.where(later, b_q, b_k) * tl.exp2(summed(take[level + 1], g_parts))).to(DTYPE)
        one = (tl.dot(b_z, tl.trans(b_z), acc[level + 1], input_precision=PRECISION),)
        return one + halves(acc, b_q, b_k, g_parts, take, level + 1, LEVELS, BLOCK, DTYPE, PRECISION)


@triton.jit(do_not_specialize=["T", "NT"])
def steep_prepare_kernel(
    q, k, g, scores, steep, sums, cu_seqlens, tiles, scale, bound, T, NT,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    STAGES: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of tiles marked steep: a tree of halves, each anchored where they meet, down to blocks about
    their centre, where alone an exponent may be positive and steps are cut at `bound`."""
    pid = tl.program_id(0)
    i_h, i_t = pid % H, pid // H
    _i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    tile = i_t.to(tl.int64) * H + i_h
    if tl.load(steep + tile) == 0:
        return
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    take = matrices(sums, 3, LEVELS + 4, BT)
    acc = empty(LEVELS + 1, BT)
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        o_k = i_k * BK + tl.arange(0, BK)
        _p, _m, b_g, b_q, b_k = inputs(q, k, g, first, o_t, length, i_h, o_k, scale, H, K)
        g_parts = parts(b_g, DTYPE)
        e, f = centred(take[0], b_g, bound, BLOCK // 2, DTYPE)
        b_e, b_f = (b_q * e).to(DTYPE), (b_k * f).to(DTYPE)
        one = (tl.dot(b_e, tl.trans(b_f), acc[0], input_precision=PRECISION),)
        acc = one + halves(acc, b_q, b_k, g_parts, take, 0, LEVELS, BLOCK, DTYPE, PRECISION)
    causal = o_i[:, None] >= o_i[None, :]
    b_a = tl.where(causal & (o_i[:, None] // BLOCK == o_i[None, :] // BLOCK), acc[0], 0.0)
    for level in tl.static_range(LEVELS):
        b_a += tl.where(causal & between(BLOCK << level, BT), acc[level + 1], 0.0)
    p_a = scores + tile * BT * BT + o_i[:, None] * BT + o_i[None, :]
    tl.store(p_a, b_a.to(scores.dtype.element_ty))
