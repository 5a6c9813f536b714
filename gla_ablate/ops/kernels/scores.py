"""Scores inside chunks: A = scale · q kᵀ under the decay between the two rows; without decay also dA = do vᵀ."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, NONE, channel_decay, head_matrix, locate, row_decay, span

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)


@triton.jit
def half_scores(
    b_q, b_k, g, first, i_s, length, i_h, o_k, w: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the later w rows of every 2w with the earlier w, anchored where they meet: both exponents are ≤ 0."""
    o_i = tl.arange(0, BT)
    prefix, suffix = channel_decay(g, first, i_s, length, i_h, o_k, w, -float("inf"), H, K, BT)
    upper = ((o_i // w) % 2 == 1)[:, None]
    b_qe = tl.where(upper, b_q * tl.exp2(prefix), 0.0).to(DTYPE)
    b_ke = tl.where(upper, 0.0, b_k * tl.exp2(suffix)).to(DTYPE)
    pair = (o_i // (2 * w))[:, None] == (o_i // (2 * w))[None, :]
    return tl.where(pair, tl.dot(b_qe, tl.trans(b_ke), input_precision=PRECISION), 0.0)


@triton.jit
def diagonal_scores(
    q, k, g, p, m, first, i_s, length, i_h, o_k, bound,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One K-slice of the scores of a tile with itself, gates on channels: a tree of halves, then blocks about their
    centre."""
    o_i = tl.arange(0, BT)
    b_q = tl.load(q + p, mask=m, other=0.0).to(tl.float32)
    b_k = tl.load(k + p, mask=m, other=0.0).to(tl.float32)
    # the pair (i, i) meets no gate: elementwise, so that the products below hold strictly earlier columns alone
    acc = tl.where(o_i[:, None] == o_i[None, :], tl.sum(b_q * b_k, axis=1)[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        acc += half_scores(b_q, b_k, g, first, i_s, length, i_h, o_k, BT >> (level + 1), H, K, BT, DTYPE, PRECISION)
    half: tl.constexpr = BLOCK // 2
    prefix, suffix = channel_decay(g, first, i_s, length, i_h, o_k, half, bound, H, K, BT)
    d = tl.where(((o_i // half) % 2 == 1)[:, None], prefix, -suffix)
    pair = ((o_i // BLOCK)[:, None] == (o_i // BLOCK)[None, :]) & (o_i[:, None] > o_i[None, :])
    # fp32 operands for every dtype: these factors reach exp(±76), and most of dg comes of the decay in here
    inner = tl.dot(b_q * tl.exp2(d), tl.trans(b_k * tl.exp2(-d)), input_precision=PRECISION)
    return acc + tl.where(pair, inner, 0.0)


@triton.jit(do_not_specialize=["T", "NT"])
def scores_kernel(
    q, k, qg, kg, g, total, scores, cu_seqlens, tiles, scale, bound, T, NT,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores `[B, T, H, C]`: row i against column j of its chunk; columns of later tiles of the chunk are not written.

    For dA: q = do, k = v, no gate, scale 1. Grid: tiles · H · TPC (a column tile each).
    """
    pid = tl.program_id(0)
    i_c, i_h, i_t = pid % TPC, (pid // TPC) % H, pid // (TPC * H)
    _, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    j_s = i_s // TPC * TPC + i_c
    if (i_s * BT >= length) | (j_s > i_s):
        return
    o_i = tl.arange(0, BT)
    o_t, o_j = i_s * BT + o_i, j_s * BT + o_i
    acc = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m = (o_t < length)[:, None] & (o_k < K)[None, :]
        p_i = ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :]
        p_j = ((first + o_j[None, :]) * H + i_h) * K + o_k[:, None]
        m_j = (o_j < length)[None, :] & (o_k < K)[:, None]
        if GATE == _CHANNEL:
            if i_c == i_s % TPC:
                acc += scale * diagonal_scores(
                    q, k, g, p_i, m, first, i_s, length, i_h, o_k, bound, H, K, BT, BLOCK, LEVELS, DTYPE, PRECISION
                )
            else:
                d = tl.exp2(span(g, total, first, i_t, i_s, j_s + 1, i_s, length, i_h, o_k, H, K, BT, GATE))
                b_q = (tl.load(qg + p_i, mask=m, other=0.0) * d[None, :]).to(DTYPE)
                acc += tl.dot(b_q, tl.load(kg + p_j, mask=m_j, other=0.0).to(DTYPE), input_precision=PRECISION)
        else:
            b_q = tl.load(q + p_i, mask=m, other=0.0).to(DTYPE)
            acc += tl.dot(b_q, tl.load(k + p_j, mask=m_j, other=0.0).to(DTYPE), input_precision=PRECISION)
    if GATE != _CHANNEL:
        acc *= scale
        if GATE != _NONE:
            if i_c == i_s % TPC:
                acc *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, False))
            else:
                prefix, _suffix = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
                _prefix, suffix = row_decay(g, first, j_s, length, i_h, H, BT, GATE)
                between = span(g, total, first, i_t, i_s, j_s + 1, i_s, length, i_h, o_i, H, K, BT, GATE)
                acc *= tl.exp2(prefix[:, None] + between + suffix[None, :])
    acc = tl.where(o_t[:, None] >= o_j[None, :], acc, 0.0)
    p = ((first + o_t[:, None]) * H + i_h) * (TPC * BT) + (i_c * BT + o_i)[None, :]
    tl.store(scores + p, acc.to(scores.dtype.element_ty), mask=(o_t < length)[:, None])
