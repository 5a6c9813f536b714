"""What the gradients of q, k and g take from the states: X = do hᵀ, Y = v dhᵀ and Σ_v h ∘ dh."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import locate


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def products_kernel(
    do, v, h, dh, x, y, flow, cu_seqlens, tiles, chunk_base, T, NT, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X, Y `[B, T, H, K]` without any decay; flow `[chunks, H, K]` = Σ_v h ∘ dh, what passes through a chunk unread
    (gates only).

    h is the state at the chunk's start, dh the state's gradient at its end. Grid: tiles · H · K/BK.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k, i_h, i_t = pid % NK, (pid // NK) % H, pid // (NK * H)
    i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    c_base = tl.load(chunk_base + i_n) if VARLEN else i_n * NC
    chunk = (c_base + i_s // TPC).to(tl.int64) * H + i_h
    o_t = i_s * BT + tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_t, m_k = o_t < length, o_k < K
    b_x = tl.zeros([BT, BK], dtype=tl.float32)
    b_y = tl.zeros([BT, BK], dtype=tl.float32)
    b_f = tl.zeros([BK], dtype=tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        p_v = ((first + o_t[:, None]) * H + i_h) * V + o_v[None, :]
        p_s = chunk * K * V + o_k[None, :] * V + o_v[:, None]  # the states read transposed, [BV, BK]
        m = m_t[:, None] & m_v[None, :]
        m_s = m_v[:, None] & m_k[None, :]
        b_h = tl.load(h + p_s, mask=m_s, other=0.0)
        b_dh = tl.load(dh + p_s, mask=m_s, other=0.0)
        b_x += tl.dot(tl.load(do + p_v, mask=m, other=0.0).to(DTYPE), b_h.to(DTYPE), input_precision=PRECISION)
        b_y += tl.dot(tl.load(v + p_v, mask=m, other=0.0).to(DTYPE), b_dh.to(DTYPE), input_precision=PRECISION)
        if GATED:
            b_f += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), axis=0)
    p = ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :]
    m = m_t[:, None] & m_k[None, :]
    tl.store(x + p, b_x.to(x.dtype.element_ty), mask=m)
    tl.store(y + p, b_y.to(y.dtype.element_ty), mask=m)
    if GATED and i_s % TPC == 0:
        tl.store(flow + chunk * K + o_k, b_f, mask=m_k)
