"""The gradients of q, k and g for gates without channels, where heads are narrow and chunks are tiles, and that of v.

What `products_kernel` hands `gradient_kernel` through memory, X, Y and dA, is then half of all that both of them move,
and small enough to stay in the registers of one program; the formulas are theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import HEAD, NONE, block, chunk_of, head_matrix, locate, row_decay, store, tile_decay
from gla_ablate.ops.kernels.parts import parts, product, turned

_HEAD = tl.constexpr(HEAD)
_NONE = tl.constexpr(NONE)


@triton.jit
def placed(i_own, tiles, T, NT, NC, COUNT, VARLEN: tl.constexpr):
    """Of a tile: its place in its sequence, the sequence's first row and length (0 past the last tile), its chunk."""
    i_t = tl.minimum(i_own, COUNT - 1)
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    return i_s, first, tl.where(i_own < COUNT, length, 0), chunk_of(i_t, i_s, tiles, NT, NC, 1, VARLEN)


@triton.jit(do_not_specialize=["T", "NT", "NC", "COUNT"])
def narrow_gradient_kernel(
    q, k, v, do, g, h, dh, dq, dk, dv, dg, tiles, scale, T, NT, NC, COUNT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, LEARNED: tl.constexpr, VALUES: tl.constexpr, SPAN: tl.constexpr,
    STAGES: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk `[B, T, HQ, K]`, with VALUES dv `[B, T, HQ, V]` and, if the gate is LEARNED, dg `[B, T, HQ]` (fixed
    gates: `[tiles, HQ]`, to be summed over tiles); dk, dv and dg are to be summed over each group. K ≤ BK. Grid:
    tiles/SPAN · HQ.

    h `[tiles, H, V, K]`, dh `[tiles, HQ, V, K]`: the state at the tile's start, the gradient of that at its end. dv is
    what a reversed scan would have, Aᵀ do + k̂ dS, of scores that are formed here.
    """
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q = pid % HQ
    i_h = i_q // GROUP
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    m_k = o_k < K
    ahead = placed(pid // HQ * SPAN, tiles, T, NT, NC, COUNT, VARLEN)
    if VARLEN:  # noqa: SIM102 (known when compiled, which the next isn't)
        if ahead[0] * BT >= ahead[2]:
            return
    # the loop over tiles is for the loads of the next one alone: what doesn't change may not take registers
    for i in tl.range(0, SPAN, num_stages=STAGES if SPAN > 1 else 1, disable_licm=True):
        i_own = pid // HQ * SPAN + i
        i_t = tl.minimum(i_own, COUNT - 1)
        if VARLEN:
            i_s, first, length, chunk = ahead
            if SPAN > 1:
                ahead = placed(i_own + 1, tiles, T, NT, NC, COUNT, VARLEN)  # before it is needed
        else:
            i_s, first, length, chunk = placed(i_own, tiles, T, NT, NC, COUNT, VARLEN)
        row = first + i_s * BT
        m_t = i_s * BT + o_i < length
        b_q = block(q, row, i_q * K, HQ * K, m_t, m_k, False)
        b_k = block(k, row, i_h * K, H * K, m_t, m_k, False)
        into, out = 1.0, 1.0
        if GATE != _NONE:
            into, out = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
        b_w = 0.0
        if VALUES:
            b_w = tl.zeros([BT, BT], dtype=tl.float32)  # [j, i]
            b_w = tl.dot(b_k.to(DTYPE), tl.trans(b_q.to(DTYPE)), b_w, input_precision=PRECISION) * scale
            if GATE != _NONE:
                b_w *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, True))
            b_w = tl.where(o_i[:, None] <= o_i[None, :], b_w, 0.0).to(DTYPE)
        b_x, b_y = tl.zeros([BK, BT], dtype=tl.float32), tl.zeros([BK, BT], dtype=tl.float32)
        b_a = tl.zeros([BT, BT], dtype=tl.float32)  # [j, i]
        passed = tl.zeros([BK], dtype=tl.float32)
        for i_v in tl.range(0, tl.cdiv(V, BV), num_stages=1):
            m_v = i_v * BV + tl.arange(0, BV) < V
            b_h = block(h, (chunk * H + i_h) * V + i_v * BV, 0, K, m_v, m_k, False)
            b_dh = block(dh, (chunk * HQ + i_q) * V + i_v * BV, 0, K, m_v, m_k, False)
            b_do = block(do, row, i_q * V + i_v * BV, HQ * V, m_t, m_v, False).to(DTYPE)
            b_v = block(v, row, i_h * V + i_v * BV, H * V, m_t, m_v, False).to(DTYPE)
            if VALUES:
                acc = tl.zeros([BT, BV], dtype=tl.float32)
                acc = tl.dot(b_k.to(DTYPE), tl.trans(b_dh.to(DTYPE)), acc, input_precision=PRECISION)
                if GATE != _NONE:
                    acc *= out[:, None]
                acc = tl.dot(b_w, b_do, acc, input_precision=PRECISION)
                store(dv, acc, row, i_q * V + i_v * BV, HQ * V, m_t, m_v, False)
            b_x = tl.dot(tl.trans(b_h.to(DTYPE)), tl.trans(b_do), b_x, input_precision=PRECISION)
            b_y = tl.dot(tl.trans(b_dh.to(DTYPE)), tl.trans(b_v), b_y, input_precision=PRECISION)
            b_a = tl.dot(b_v, tl.trans(b_do), b_a, input_precision=PRECISION)
            if LEARNED:
                passed += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), axis=0)
        b_self = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_a, 0.0), axis=0)[None, :]
        b_a = tl.where(o_i[:, None] < o_i[None, :], b_a, 0.0)
        if GATE != _NONE:
            b_a *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, True))
            b_x *= into[None, :]
            b_y *= out[None, :]
        pairs = parts(b_a, DTYPE)
        b_q, b_k = tl.trans(b_q), tl.trans(b_k)
        b_u = product((b_k.to(DTYPE),), pairs, b_x, PRECISION)
        b_l = product((b_q.to(DTYPE),), turned(pairs), tl.zeros([BK, BT], dtype=tl.float32), PRECISION) * scale
        b_k, b_q = b_k.to(tl.float32), b_q.to(tl.float32) * scale
        store(dq, tl.trans((b_u + b_self * b_k) * scale), row, i_q * K, HQ * K, m_t, m_k, False)
        store(dk, tl.trans(b_l + b_y + b_self * b_q), row, i_q * K, HQ * K, m_t, m_k, False)
        if LEARNED:
            b_f = tl.sum(passed) * tile_decay(g, into, i_s, length, i_h, BT, GATE)
            # over row t: what is read from it on, less what its own tile wrote from it on; what leaves from before it
            ended, begun = tl.sum(b_q * b_u - b_k * b_l, axis=0), tl.sum(b_k * b_y, axis=0)
            from_it_on = o_i[None, :] >= o_i[:, None]
            b_dg = tl.sum(tl.where(from_it_on, ended[None, :], begun[None, :]), axis=1) + b_f
            if GATE == _HEAD:
                b_dg = tl.sum(tl.where(m_t, b_dg, 0.0))
                tl.store(dg + i_t.to(tl.int64) * HQ + i_q, b_dg, mask=i_s * BT < length)
            else:
                tl.store(dg + (row + o_i) * HQ + i_q, b_dg, mask=m_t)
