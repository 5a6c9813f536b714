"""The state between chunks, forward and, with the roles swapped, its gradient backward."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, NONE, row_decay, span

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def scan_kernel(
    a, b, g, total, start, states, end, cu_seqlens, tile_base, chunk_base, scale, T, NT, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr, STORE_END: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← exp(total) S + âᵀ b, tile by tile; `states[c]` `[chunks, H, K, V]` is S as chunk c meets it.

    Forward, a = k (kg for gates on channels), b = v, â carries the decay to the tile's end; `states` holds the state at
    each chunk's start. Backward in time, a = q (qg), b = do, â carries scale and the decay from the tile's start;
    `states` holds the gradient of the state at each chunk's end. `start`, `end` `[N, H, K, V]`, fp32.
    Grid: N · H · K/BK · V/BV.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_k, i_h, i_n = pid % NV, (pid // NV) % NK, (pid // (NV * NK)) % H, pid // (NV * NK * H)
    if VARLEN:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
        n_tiles = tl.cdiv(length, BT)
        t_base = tl.load(tile_base + i_n)
        c_base = tl.load(chunk_base + i_n)
    else:
        first = i_n.to(tl.int64) * T
        length = T
        n_tiles = NT
        t_base = i_n * NT
        c_base = i_n * NC
    o_i = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    head = i_n.to(tl.int64) * H + i_h
    if HAS_START:
        b_s = tl.load(start + head * K * V + p_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros([BK, BV], dtype=tl.float32)
    for step in range(0, n_tiles):
        if REVERSE:
            i_s = n_tiles - 1 - step
            meets = (step == 0) | (i_s % TPC == TPC - 1)
        else:
            i_s = step
            meets = i_s % TPC == 0
        if meets:
            row = (c_base + i_s // TPC).to(tl.int64) * H + i_h
            tl.store(states + row * K * V + p_s, b_s.to(states.dtype.element_ty), mask=m_s)
        o_t = i_s * BT + o_i
        m_t = o_t < length
        b_a = tl.load(
            a + ((first + o_t[None, :]) * H + i_h) * K + o_k[:, None], mask=(o_k < K)[:, None] & m_t[None, :], other=0.0
        )  # [BK, BT]
        b_b = tl.load(
            b + ((first + o_t[:, None]) * H + i_h) * V + o_v[None, :], mask=m_t[:, None] & (o_v < V)[None, :], other=0.0
        )
        if GATE != _NONE and GATE != _CHANNEL:
            prefix, suffix = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
            b_a = b_a.to(tl.float32) * tl.exp2(prefix if REVERSE else suffix)[None, :]
        b_x = tl.dot(b_a.to(states.dtype.element_ty), b_b.to(states.dtype.element_ty), input_precision=PRECISION)
        if REVERSE and GATE != _CHANNEL:
            b_x *= scale
        if GATE == _NONE:
            b_s += b_x
        else:
            d = tl.exp2(span(g, total, first, t_base + i_s, i_s, i_s, i_s + 1, length, i_h, o_k, H, K, BT, GATE))
            b_s = b_s * (d[:, None] if GATE == _CHANNEL else d) + b_x
    if STORE_END:
        tl.store(end + head * K * V + p_s, b_s, mask=m_s)
