"""Few heads and long sequences, or packed ones of very different lengths: a scan over segments, side by side, once each
has the state that it begins with.

`states_kernel` goes over every segment but the last from a state of zero; what remains is linear in the state before
it, start of the next = decay of the segment · start + end, a short pass over segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, HEAD, TOKEN, head_gate
from gla_ablate.ops.kernels.places import segment_at, sequence_at

_CHANNEL = tl.constexpr(CHANNEL)
_HEAD = tl.constexpr(HEAD)
_TOKEN = tl.constexpr(TOKEN)


@triton.jit(do_not_specialize=["T", "NT", "NC", "SEG", "NSEG"])
def segments_kernel(
    g, passed, start, borders, cu_seqlens, tile_base, chunk_base, segments, own_segments, T, NT, NC, SEG, NSEG,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr, VARLEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """borders `[rows, HQ, K, V]`: in place of what each segment ends with if it begins with zero, what it begins with;
    start `[N, HQ, K, V]` of the sequence; passed, for gates on channels `[rows, HQ, K]`, a token `[rows, HQ]`; all
    fp32. Grid: N · HQ · K/BK · V/BV.
    """
    HQ: tl.constexpr = H * GROUP
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_k, i_q, i_n = pid % NV, (pid // NV) % NK, (pid // (NV * NK)) % HQ, pid // (NV * NK * HQ)
    i_h = i_q // GROUP
    if VARLEN:
        marks = own_segments + 3 * i_n
        base, count, row = tl.load(marks), tl.load(marks + 1), tl.load(marks + 2)
        if count < 2:
            return
    else:
        base, count, row = i_n * NSEG, NSEG, i_n * NSEG
    _first, length, _base, _n, _chunk = sequence_at(i_n, cu_seqlens, tile_base, chunk_base, T, NT, NC, BT, VARLEN)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = i_q.to(tl.int64) * K * V + o_k[:, None] * V + o_v[None, :]
    b_s = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_START:
        b_s = tl.load(start + i_n.to(tl.int64) * HQ * K * V + p_s, mask=m_s, other=0.0)
    for j in tl.range(0, count - 1, num_stages=STAGES):
        at = count - 1 - j if REVERSE else j
        _i_n, begin, stop, _row = segment_at(base + at, segments, SEG, NSEG, NT, VARLEN)
        own = (row + at).to(tl.int64) * HQ
        p = borders + own * K * V + p_s
        b_e = tl.load(p, mask=m_s, other=0.0)
        tl.store(p, b_s, mask=m_s)
        if GATE == _CHANNEL:
            b_s *= tl.load(passed + (own + i_q) * K + o_k, mask=o_k < K, other=0.0)[:, None]
        elif GATE == _TOKEN:
            b_s *= tl.load(passed + own + i_q)
        elif GATE == _HEAD:
            rows = tl.maximum(tl.minimum(stop * BT, length) - begin * BT, 0)
            b_s *= tl.exp2(head_gate(g, i_h) * rows)
        b_s += b_e
    last = row if REVERSE else row + count - 1
    tl.store(borders + last.to(tl.int64) * HQ * K * V + p_s, b_s, mask=m_s)
