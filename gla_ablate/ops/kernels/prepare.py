"""Gates on channels: q and k with the decay to their tile's borders, and the scores of each tile with itself.

Two kernels take the same tiles. Where the gates of a tile are mild, one anchor in its middle serves all its rows: no
exponent leaves the range of fp32, and a score is exp(d_i) q_i · exp(−d_j) k_j. `prepare_kernel` assumes it, finds out,
and marks the other tiles, which `steep_prepare_kernel` does over.

What the two factors of a score lose in 16 bits would be most of the error of o and dv, so each is in two halves, but
for pairs of a steep tile that lie in different blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import across, locate, store
from gla_ablate.ops.kernels.decay import between, centred, clipped, gates, is_later, matrices, matrix, summed
from gla_ablate.ops.kernels.parts import parts, product, turned


@triton.jit(do_not_specialize=["T", "NT"])
def prepare_kernel(
    q, k, g, qg, kg, decay, halves, scores, steep, sums, cu_seqlens, tiles, scale, mild, T, NT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """qg = scale · q · exp(prefix) `[tiles, HQ, BT, K]`, kg = k · exp(suffix) `[tiles, H, BT, K]`, zero past a
    sequence's end; decay `[tiles, H, K]` and halves `[tiles, H, 2, K]`: what a whole tile and its halves let through;
    scores `[tiles, HQ, BT, BT]` of each tile with itself; steep `[tiles, H]`: whether a half decays by more than
    `mild` (log2), which leaves all but decay and halves to be done over. Grid: tiles · HQ.

    DESC: q, k, g, qg, kg are tensor descriptors; WHOLE: no sequence ends inside a tile.
    """
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q, i_t = pid % HQ, pid // HQ
    i_h = i_q // GROUP
    _i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    o_i = tl.arange(0, BT)
    m_t = i_s * BT + o_i < length
    m_i = o_i < BT
    row = first + i_s * BT
    tile, own = i_t.to(tl.int64) * H + i_h, i_t.to(tl.int64) * HQ + i_q
    middle = matrix(sums, LEVELS + 2, BT, BT)
    acc = tl.zeros([BT, BT], dtype=tl.float32)
    beyond = 0
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col = i_h * K + i_k * BK
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_g = gates(g, row, col, H * K, m_t, m_k, DESC, WHOLE)
        b_q = across(q, row, i_q * K + i_k * BK, HQ * K, m_t, m_k, DESC, WHOLE)
        b_k = across(k, row, col, H * K, m_t, m_k, DESC, WHOLE)
        early = tl.sum(tl.where(is_later(BT // 2, BT), 0.0, b_g), axis=1)
        late = tl.sum(tl.where(is_later(BT // 2, BT), b_g, 0.0), axis=1)
        is_mild = (tl.abs(early) <= mild) & (tl.abs(late) <= mild)
        beyond = tl.maximum(beyond, tl.max(is_mild.to(tl.int32) ^ 1, axis=0))  # so that NaN is beyond
        early, late = tl.exp2(early), tl.exp2(late)
        if i_q % GROUP == 0:  # what a group has in common
            tl.store(decay + tile * K + o_k, early * late, mask=m_k)
            tl.store(halves + 2 * tile * K + o_k, early, mask=m_k)
            tl.store(halves + (2 * tile + 1) * K + o_k, late, mask=m_k)
        if beyond == 0:
            d = centred(parts(b_g, DTYPE), middle, BT // 2)
            b_e = b_q.to(tl.float32) * scale * tl.exp2(d)
            b_f = b_k.to(tl.float32) * tl.exp2(-d)
            store(qg, tl.trans(b_e * early[:, None]), own * BT, i_k * BK, K, m_i, m_k, DESC)
            if i_q % GROUP == 0:
                store(kg, tl.trans(b_f * late[:, None]), tile * BT, i_k * BK, K, m_i, m_k, DESC)
            acc = product(turned(parts(b_e, DTYPE)), parts(b_f, DTYPE), acc, PRECISION)
    acc = tl.where(o_i[:, None] >= o_i[None, :], acc, 0.0)
    tl.store(scores + own * BT * BT + o_i[:, None] * BT + o_i[None, :], acc.to(scores.dtype.element_ty))
    if i_q % GROUP == 0:
        tl.store(steep + tile, beyond)


@triton.jit(do_not_specialize=["T", "NT"])
def steep_prepare_kernel(
    q, k, g, qg, kg, scores, steep, sums, cu_seqlens, tiles, scale, T, NT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    BOUND: tl.constexpr, LEVELS: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """qg, kg and the scores of tiles marked steep: a tree of halves, each anchored where they meet, down to blocks
    about their centre, where alone an exponent may be positive and steps are cut at BOUND."""
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q, i_t = pid % HQ, pid // HQ
    i_h = i_q // GROUP
    _i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    tile, own = i_t.to(tl.int64) * H + i_h, i_t.to(tl.int64) * HQ + i_q
    if tl.load(steep + tile) == 0:
        return
    o_i = tl.arange(0, BT)
    m_t = i_s * BT + o_i < length
    m_i = o_i < BT
    row = first + i_s * BT
    take = matrices(sums, 0, LEVELS + 3, BT, BT)
    causal = o_i[:, None] >= o_i[None, :]
    zero = tl.zeros([BT, BT], dtype=tl.float32)
    acc = zero
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col = i_h * K + i_k * BK
        m_k = i_k * BK + tl.arange(0, BK) < K
        g_parts = parts(gates(g, row, col, H * K, m_t, m_k, DESC, WHOLE), DTYPE)
        b_q = across(q, row, i_q * K + i_k * BK, HQ * K, m_t, m_k, DESC, WHOLE).to(tl.float32) * scale
        b_k = across(k, row, col, H * K, m_t, m_k, DESC, WHOLE).to(tl.float32)
        b_p, b_s = b_q * tl.exp2(summed(g_parts, take[0])), b_k * tl.exp2(summed(g_parts, take[1]))
        store(qg, tl.trans(b_p), own * BT, i_k * BK, K, m_i, m_k, DESC)
        if i_q % GROUP == 0:
            store(kg, tl.trans(b_s), tile * BT, i_k * BK, K, m_i, m_k, DESC)
        # the later half of every 2w rows with the earlier: one tile holds both factors, each with the decay to where
        # they meet, both exponents ≤ 0
        for level in tl.static_range(LEVELS):
            later = is_later(BLOCK << level, BT)
            b_z = (tl.where(later, b_q, b_k) * tl.exp2(summed(g_parts, take[level + 3]))).to(DTYPE)
            b_a = tl.dot(tl.trans(b_z), b_z, input_precision=PRECISION)
            acc += tl.where(causal & between(BLOCK << level, BT), b_a, 0.0)
        d = centred(clipped(g_parts, BOUND), take[2], BLOCK // 2)
        b_e, b_f = parts(b_q * tl.exp2(d), DTYPE), parts(b_k * tl.exp2(-d), DTYPE)
        b_a = product(turned(b_e), b_f, zero, PRECISION)
        acc += tl.where(causal & (o_i[:, None] // BLOCK == o_i[None, :] // BLOCK), b_a, 0.0)
    p_a = scores + own * BT * BT + o_i[:, None] * BT + o_i[None, :]
    tl.store(p_a, acc.to(scores.dtype.element_ty))
