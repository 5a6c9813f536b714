"""The output from scores and states and, with the roles swapped, the gradient of v."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, NONE, locate, row_decay, span

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def output_kernel(
    a, b, scores, states, g, total, o, cu_seqlens, tiles, chunk_base, scale, T, NT, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_I = q̂_I h + Σ_{J ≤ I} A_IJ v_J, or, reversed, dv_J = k̂_J dh + Σ_{I ≥ J} A_IJᵀ do_I, over the tiles of a
    chunk.

    a = q (qg for gates on channels), b = v, states = h at the chunk's start; reversed a = k (kg), b = do, states = dh
    at its end. Grid: tiles · H · V/BV.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_h, i_t = pid % NV, (pid // NV) % H, pid // (NV * H)
    i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    c_base = tl.load(chunk_base + i_n) if VARLEN else i_n * NC
    begin = i_s // TPC * TPC
    end = tl.minimum(begin + TPC, tl.cdiv(length, BT))
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    o_v = i_v * BV + tl.arange(0, BV)
    m_t, m_v = o_t < length, o_v < V
    # whole tiles between these rows and the state: before them, or, reversed, after them
    near = i_s + 1 if REVERSE else begin
    far = end if REVERSE else i_s
    p_state = ((c_base + i_s // TPC).to(tl.int64) * H + i_h) * K * V
    acc = tl.zeros([BT, BV], dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_a = tl.load(
            a + ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0
        )
        if GATE == _CHANNEL and TPC > 1:
            b_a = b_a * tl.exp2(span(g, total, first, i_t, i_s, near, far, length, i_h, o_k, H, K, BT, GATE))[None, :]
        b_s = tl.load(states + p_state + o_k[:, None] * V + o_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0)
        acc += tl.dot(b_a.to(DTYPE), b_s.to(DTYPE), input_precision=PRECISION)
    if GATE != _CHANNEL:
        if GATE != _NONE:
            prefix, suffix = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
            chain = span(g, total, first, i_t, i_s, near, far, length, i_h, o_i, H, K, BT, GATE)
            acc *= tl.exp2((suffix if REVERSE else prefix) + chain)[:, None]
        if not REVERSE:
            acc *= scale
    for j_s in range(i_s if REVERSE else begin, end if REVERSE else i_s + 1):
        o_j = j_s * BT + o_i
        m_j = o_j < length
        if REVERSE:  # Aᵀ is read as such: some Tritons miscompile the transpose of a result on its way into a product
            p_x = ((first + o_j[None, :]) * H + i_h) * (TPC * BT) + ((i_s - begin) * BT + o_i)[:, None]
            b_x = tl.load(scores + p_x, mask=m_j[None, :], other=0.0)
        else:
            p_x = ((first + o_t[:, None]) * H + i_h) * (TPC * BT) + ((j_s - begin) * BT + o_i)[None, :]
            b_x = tl.load(scores + p_x, mask=m_t[:, None], other=0.0)
        b_b = tl.load(
            b + ((first + o_j[:, None]) * H + i_h) * V + o_v[None, :], mask=m_j[:, None] & m_v[None, :], other=0.0
        )
        acc += tl.dot(b_x.to(DTYPE), b_b.to(DTYPE), input_precision=PRECISION)
    p_o = o + ((first + o_t[:, None]) * H + i_h) * V + o_v[None, :]
    tl.store(p_o, acc.to(o.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])
