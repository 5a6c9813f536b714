"""The gradients of q, k and g for gates without channels, where heads are narrow and chunks are tiles.

What `products_kernel` hands `gradient_kernel` through memory, X, Y and dA, is then half of all that both of them move,
and small enough to stay in the registers of one program; the formulas are theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import HEAD, NONE, chunk_of, head_matrix, locate, row_decay, tile_decay
from gla_ablate.ops.kernels.parts import parts, product, turned

_HEAD = tl.constexpr(HEAD)
_NONE = tl.constexpr(NONE)


@triton.jit
def value_gradient(
    q, k, do, g, dh, dv, first, i_s, length, i_h, row_q, row_k, place, m_t, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of a tile as a reversed scan has it, Aᵀ do + k̂ dS, dS in dh at `place`."""
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    m_k = o_k < K
    m = m_t[:, None] & m_k[None, :]
    b_k = tl.load(k + row_k[:, None] * K + o_k[None, :], mask=m, other=0.0).to(DTYPE)
    b_q = tl.load(q + row_q[:, None] * K + o_k[None, :], mask=m, other=0.0).to(DTYPE)
    b_w = tl.zeros([BT, BT], dtype=tl.float32)
    b_w = tl.dot(b_k, tl.trans(b_q), b_w, input_precision=PRECISION) * scale
    suffix = 0.0
    if GATE != _NONE:
        b_w *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, True))
        _, suffix = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
    b_w = tl.where(o_i[:, None] <= o_i[None, :], b_w, 0.0).to(DTYPE)
    for i_v in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        p_s, p_v = o_v[None, :] * K + o_k[:, None], row_q[:, None] * V + o_v[None, :]
        b_dh = tl.load(dh + place * K * V + p_s, mask=m_k[:, None] & m_v[None, :], other=0.0).to(DTYPE)
        b_do = tl.load(do + p_v, mask=m_t[:, None] & m_v[None, :], other=0.0).to(DTYPE)
        acc = tl.zeros([BT, BV], dtype=tl.float32)
        acc = tl.dot(b_k, b_dh, acc, input_precision=PRECISION)
        if GATE != _NONE:
            acc *= tl.exp2(suffix)[:, None]
        acc = tl.dot(b_w, b_do, acc, input_precision=PRECISION)
        tl.store(dv + p_v, acc.to(dv.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def narrow_gradient_kernel(
    q, k, v, do, g, h, dh, dq, dk, dv, dg, tiles, scale, T, NT, NC,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, LEARNED: tl.constexpr, VALUES: tl.constexpr, STAGES: tl.constexpr,
    VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk `[B, T, HQ, K]`, with VALUES dv `[B, T, HQ, V]` and, if the gate is LEARNED, dg `[B, T, HQ]` (fixed
    gates: `[tiles, HQ]`, to be summed over tiles); dk, dv and dg are to be summed over each group. K ≤ BK. Grid:
    tiles · HQ.

    h `[tiles, H, V, K]`, dh `[tiles, HQ, V, K]`: the state at the tile's start, the gradient of that at its end.
    """
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q, i_t = pid % HQ, pid // HQ
    i_h = i_q // GROUP
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    chunk = chunk_of(i_t, i_s, tiles, NT, NC, 1, VARLEN)
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_t = i_s * BT + o_i
    m_t, m_k = o_t < length, o_k < K
    row_q, row_k = (first + o_t) * HQ + i_q, (first + o_t) * H + i_h
    if VALUES:
        value_gradient(
            q, k, do, g, dh, dv, first, i_s, length, i_h, row_q, row_k, chunk * HQ + i_q, m_t, scale, H, K, V, BT, BK,
            BV, GATE, STAGES, DTYPE, PRECISION,
        )  # fmt: skip
    b_x, b_y = tl.zeros([BK, BT], dtype=tl.float32), tl.zeros([BK, BT], dtype=tl.float32)
    b_a = tl.zeros([BT, BT], dtype=tl.float32)  # [j, i]
    passed = tl.zeros([BK], dtype=tl.float32)
    for i_v in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_s = m_k[:, None] & m_v[None, :]
        p_s = o_v[None, :] * K + o_k[:, None]
        b_h = tl.load(h + (chunk * H + i_h) * K * V + p_s, mask=m_s, other=0.0)
        b_dh = tl.load(dh + (chunk * HQ + i_q) * K * V + p_s, mask=m_s, other=0.0)
        m = m_t[:, None] & m_v[None, :]
        b_do = tl.load(do + row_q[:, None] * V + o_v[None, :], mask=m, other=0.0).to(DTYPE)
        b_v = tl.load(v + row_k[:, None] * V + o_v[None, :], mask=m, other=0.0).to(DTYPE)
        b_x = tl.dot(b_h.to(DTYPE), tl.trans(b_do), b_x, input_precision=PRECISION)
        b_y = tl.dot(b_dh.to(DTYPE), tl.trans(b_v), b_y, input_precision=PRECISION)
        b_a = tl.dot(b_v, tl.trans(b_do), b_a, input_precision=PRECISION)
        if LEARNED:
            passed += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), axis=1)
    b_self = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_a, 0.0), axis=0)[None, :]
    b_a = tl.where(o_i[:, None] < o_i[None, :], b_a, 0.0)
    if GATE != _NONE:
        b_a *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, True))
        prefix, suffix = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
        b_x *= tl.exp2(prefix)[None, :]
        b_y *= tl.exp2(suffix)[None, :]
    pairs = parts(b_a, DTYPE)
    m = m_k[:, None] & m_t[None, :]
    p_q, p_k = row_q[None, :] * K + o_k[:, None], row_k[None, :] * K + o_k[:, None]
    b_k = tl.load(k + p_k, mask=m, other=0.0)
    b_u = product((b_k.to(DTYPE),), pairs, b_x, PRECISION)
    b_q = tl.load(q + p_q, mask=m, other=0.0)
    b_l = product((b_q.to(DTYPE),), turned(pairs), tl.zeros([BK, BT], dtype=tl.float32), PRECISION) * scale
    b_k, b_q = b_k.to(tl.float32), b_q.to(tl.float32) * scale
    tl.store(dq + p_q, ((b_u + b_self * b_k) * scale).to(dq.dtype.element_ty), mask=m)
    tl.store(dk + p_q, (b_l + b_y + b_self * b_q).to(dk.dtype.element_ty), mask=m)
    if LEARNED:
        b_f = tl.sum(passed) * tile_decay(g, first, i_s, length, i_h, H, BT, GATE)
        # over row t: what is read from it on, less what its own tile wrote from it on; what leaves from before it
        ended, begun = tl.sum(b_q * b_u - b_k * b_l, axis=0), tl.sum(b_k * b_y, axis=0)
        from_it_on = o_i[None, :] >= o_i[:, None]
        b_dg = tl.sum(tl.where(from_it_on, ended[None, :], begun[None, :]), axis=1) + b_f
        if GATE == _HEAD:
            tl.store(dg + i_t.to(tl.int64) * HQ + i_q, tl.sum(tl.where(m_t, b_dg, 0.0)))
        else:
            tl.store(dg + row_q, b_dg, mask=m_t)
