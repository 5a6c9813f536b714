"""Long sequences, few heads: the pass over a sequence cut into segments that run side by side once each has its start.

`scan_kernel` goes over every segment from a state of zero; what remains is linear in the state before it, start of the
next = decay of the segment · start + end, a short pass over segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, HEAD, LOG2E, TOKEN, head_gate

_CHANNEL = tl.constexpr(CHANNEL)
_HEAD = tl.constexpr(HEAD)
_TOKEN = tl.constexpr(TOKEN)
AT_ONCE = tl.constexpr(64)  # tiles whose decay is loaded together


@triton.jit
def product(a, b):
    return a * b


@triton.jit(do_not_specialize=["T", "NT", "SEG", "NSEG"])
def segments_kernel(
    ends, g, decay, start, starts, end, cu_seqlens, tile_base, T, NT, SEG, NSEG,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr, STORE_END: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """starts `[N, NSEG, HQ, K, V]` of segments of SEG tiles, from what they end with, `ends`, if they start at zero;
    start, end `[N, HQ, K, V]` of the sequence; all fp32. Grid: N · HQ · K/BK · V/BV.
    """
    HQ: tl.constexpr = H * GROUP
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_k, i_q, i_n = pid % NV, (pid // NV) % NK, (pid // (NV * NK)) % HQ, pid // (NV * NK * HQ)
    i_h = i_q // GROUP
    if VARLEN:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
        t_base = tl.load(tile_base + i_n)
    else:
        first = i_n.to(tl.int64) * T
        length = T
        t_base = i_n * NT
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = i_q.to(tl.int64) * K * V + o_k[:, None] * V + o_v[None, :]
    whole = i_n.to(tl.int64) * HQ * K * V
    b_s = tl.load(start + whole + p_s, mask=m_s, other=0.0) if HAS_START else tl.zeros([BK, BV], dtype=tl.float32)
    for i in range(0, NSEG):
        segment = NSEG - 1 - i if REVERSE else i
        p = whole * NSEG + segment.to(tl.int64) * HQ * K * V + p_s
        tl.store(starts + p, b_s, mask=m_s)
        begin = segment * SEG
        stop = tl.minimum(begin + SEG, tl.cdiv(length, BT))
        if GATE == _CHANNEL:
            d = tl.full([BK], 1.0, dtype=tl.float32)
            for j in range(begin, stop, AT_ONCE):
                o_s = j + tl.arange(0, AT_ONCE)
                p_d = ((t_base + o_s).to(tl.int64)[:, None] * H + i_h) * K + o_k[None, :]
                b_d = tl.load(decay + p_d, mask=(o_s < stop)[:, None] & (o_k < K)[None, :], other=1.0)
                d *= tl.reduce(b_d, 0, product)
            b_s *= d[:, None]
        elif GATE == _TOKEN:
            total = 0.0
            for j in range(begin, stop, AT_ONCE):
                o_t = j * BT + tl.arange(0, AT_ONCE * BT)
                rows = tl.minimum(stop * BT, length)
                total += tl.sum(tl.load(g + (first + o_t) * H + i_h, mask=o_t < rows, other=0.0) * LOG2E)
            b_s *= tl.exp2(total)
        elif GATE == _HEAD:
            rows = tl.maximum(tl.minimum(stop * BT, length) - begin * BT, 0)
            b_s *= tl.exp2(head_gate(g, i_h) * rows)
        b_s += tl.load(ends + p, mask=m_s, other=0.0)
    if STORE_END:
        tl.store(end + whole + p_s, b_s, mask=m_s)
