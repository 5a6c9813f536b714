"""What the gradients of q, k and g take from the states, X = S do, Y = dS v and Σ_v S ∘ dS, and dA = do vᵀ.

States are kept at the borders of chunks alone; those at the borders of the tiles inside are formed anew here, so that
only the pairs inside one tile are left to `gradient_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, NONE, chunk_of, kept_row_decay, kept_tile_decay, locate, store

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)


@triton.jit
def empty(BT: tl.constexpr, BK: tl.constexpr, n: tl.constexpr):
    """(X, Y, flow) of n tiles, all zero."""
    b = tl.zeros([BK, BT], dtype=tl.float32)
    one = ((b, b, tl.zeros([BK], dtype=tl.float32)),)
    if n == 1:
        return one
    else:
        return one + empty(BT, BK, n - 1)


@triton.jit
def factors(
    read, write, g, decay, first, i_t, i_s, length, i_q, o_k, scale, n: tl.constexpr, H: tl.constexpr,
    GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of n tiles from i_s on: q̂ and k̂, transposed `[BK, BT]`, and the tile's decay."""
    HQ: tl.constexpr = H * GROUP
    i_h = i_q // GROUP
    o_i = tl.arange(0, BT)
    m_k = (o_k < K)[:, None]
    if GATE == _CHANNEL:
        p_q = (i_t.to(tl.int64) * HQ + i_q) * BT * K + o_i[None, :] * K + o_k[:, None]
        p_k = (i_t.to(tl.int64) * H + i_h) * BT * K + o_i[None, :] * K + o_k[:, None]
        m = m_k & (i_s * BT + o_i < length)[None, :]
        b_q = tl.load(read + p_q, mask=m, other=0.0)
        b_k = tl.load(write + p_k, mask=m, other=0.0)
        # o_k * 0: the interpreter takes no mask that mixes a block with a lone boolean
        m = (o_k < K) & (o_k * 0 + i_s * BT < length)
        d = tl.load(decay + (i_t.to(tl.int64) * H + i_h) * K + o_k, mask=m, other=1.0)
    else:
        o_t = i_s * BT + o_i
        p_q = ((first + o_t[None, :]) * HQ + i_q) * K + o_k[:, None]
        p_k = ((first + o_t[None, :]) * H + i_h) * K + o_k[:, None]
        m = m_k & (o_t < length)[None, :]
        b_q = tl.load(read + p_q, mask=m, other=0.0).to(tl.float32) * scale
        b_k = tl.load(write + p_k, mask=m, other=0.0).to(tl.float32)
        if GATE != _NONE:
            into, out = kept_row_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
            b_q *= into[None, :]
            b_k *= out[None, :]
        d = kept_tile_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
    one = ((b_q.to(DTYPE), b_k.to(DTYPE), d),)
    if n == 1:
        return one
    else:
        return one + factors(
            read, write, g, decay, first, i_t + 1, i_s + 1, length, i_q, o_k, scale, n - 1, H, GROUP, K, BT, GATE, DTYPE
        )


@triton.jit
def values(
    do, v, p_do, p_v, W: tl.constexpr, GROUP: tl.constexpr, o_t, length, m_v, n: tl.constexpr, BT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """do and v `[BT, BV]` of n tiles from p_do, p_v on; a row of v holds W numbers, one of do GROUP · W."""
    m = (o_t < length)[:, None] & m_v
    b_do = tl.load(do + p_do, mask=m, other=0.0).to(DTYPE)
    b_v = tl.load(v + p_v, mask=m, other=0.0).to(DTYPE)
    if n == 1:
        return ((b_do, b_v),)
    else:
        p_do, p_v = p_do + BT * (GROUP * W), p_v + BT * W
        return ((b_do, b_v),) + values(do, v, p_do, p_v, W, GROUP, o_t + BT, length, m_v, n - 1, BT, DTYPE)


@triton.jit
def advance(b_s, d, b_a, b_b, GATE: tl.constexpr, PRECISION: tl.constexpr):
    """The state `[BK, BV]` a tile further on (for the gradient of states: further back)."""
    if GATE == _CHANNEL:
        b_s = b_s * d[:, None]
    elif GATE != _NONE:
        b_s = b_s * d
    return tl.dot(b_a, b_b, b_s, input_precision=PRECISION)


@triton.jit
def inside(
    acc, b_h, b_dh, known, rows, t: tl.constexpr, n: tl.constexpr, GATE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(X, Y, flow) of tiles t … t + n − 1, with b_h the state before them and b_dh the gradient of that behind."""
    if n == 1:
        b_do, b_v = rows[t]
        b_x, b_y, b_f = acc[t]
        b_f += tl.sum(b_h * b_dh, axis=1)
        b_x = tl.dot(b_h.to(DTYPE), tl.trans(b_do), b_x, input_precision=PRECISION)
        b_y = tl.dot(b_dh.to(DTYPE), tl.trans(b_v), b_y, input_precision=PRECISION)
        return ((b_x, b_y, b_f),)
    else:
        half: tl.constexpr = n // 2
        middle, d_middle = b_h, b_dh
        for j in tl.static_range(half):
            _b_q, b_k, d = known[t + j]
            middle = advance(middle, d, b_k, rows[t + j][1], GATE, PRECISION)
            b_q, _b_k, d = known[t + n - 1 - j]
            d_middle = advance(d_middle, d, b_q, rows[t + n - 1 - j][0], GATE, PRECISION)
        early = inside(acc, b_h, d_middle, known, rows, t, half, GATE, DTYPE, PRECISION)
        return early + inside(acc, middle, b_dh, known, rows, t + half, half, GATE, DTYPE, PRECISION)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def products_kernel(
    do, v, h, dh, read, write, g, decay, x, y, flow, da, tiles, scale, T, NT, NC,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, LEARNED: tl.constexpr, VARLEN: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x = Xᵀ, y = Yᵀ `[chunks, HQ, K, C]` without the decay inside their tile; da = dAᵀ `[tiles, HQ, BT, BT]`; if the
    gate is LEARNED, flow `[tiles, HQ, K]` = Σ_v S ∘ dS, what a tile meets and what becomes of it. Y and flow are sums
    over the query heads of a group: here is the part of each.

    h `[chunks, H, V, K]`, dh `[chunks, HQ, V, K]`: the state at the chunk's start, the gradient at its end; read,
    write: q, k, or qg, kg for gates on channels; decay: as in `scan_kernel`. Grid: tiles · HQ · (K/BK + 1): one
    program a chunk and slice of K, and one for da.
    """
    HQ: tl.constexpr = H * GROUP
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k, i_q, i_t = pid % (NK + 1), (pid // (NK + 1)) % HQ, pid // ((NK + 1) * HQ)
    i_h = i_q // GROUP
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    if (i_s * BT >= length) | (i_s % TPC != 0):
        return
    chunk = chunk_of(i_t, i_s, tiles, NT, NC, TPC, VARLEN)
    chunk, own = chunk * H + i_h, chunk * HQ + i_q
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    o_k = i_k * BK + tl.arange(0, BK)
    p_do = ((first + o_t[:, None]) * HQ + i_q) * V
    p_v = ((first + o_t[:, None]) * H + i_h) * V
    if i_k == NK:
        for t in range(0, TPC):
            m_t = (o_t + t * BT < length)[:, None]
            b_a = tl.zeros([BT, BT], dtype=tl.float32)
            for i_v in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
                o_v = i_v * BV + tl.arange(0, BV)[None, :]
                m = m_t & (o_v < V)
                b_do = tl.load(do + p_do + t * (BT * HQ * V) + o_v, mask=m, other=0.0).to(DTYPE)
                b_v = tl.load(v + p_v + t * (BT * H * V) + o_v, mask=m, other=0.0).to(DTYPE)
                b_a = tl.dot(b_v, tl.trans(b_do), b_a, input_precision=PRECISION)
            if (i_s + t) * BT < length:
                p_a = da + ((i_t + t).to(tl.int64) * HQ + i_q) * BT * BT + o_i[:, None] * BT + o_i[None, :]
                tl.store(p_a, b_a.to(da.dtype.element_ty))
    else:
        known = factors(
            read, write, g, decay, first, i_t, i_s, length, i_q, o_k, scale, TPC, H, GROUP, K, BT, GATE, DTYPE
        )
        acc = empty(BT, BK, TPC)
        for i_v in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = o_v < V
            p_h = chunk * K * V + o_v[None, :] * K + o_k[:, None]
            p_dh = own * K * V + o_v[None, :] * K + o_k[:, None]
            m_s = (o_k < K)[:, None] & m_v[None, :]
            b_h = tl.load(h + p_h, mask=m_s, other=0.0).to(tl.float32)
            b_dh = tl.load(dh + p_dh, mask=m_s, other=0.0).to(tl.float32)
            rows = values(
                do, v, p_do + o_v[None, :], p_v + o_v[None, :], H * V, GROUP, o_t, length, m_v[None, :], TPC, BT, DTYPE
            )
            acc = inside(acc, b_h, b_dh, known, rows, 0, TPC, GATE, DTYPE, PRECISION)
        for t in tl.static_range(TPC):
            row_x = own * K + i_k * BK
            store(x, acc[t][0], row_x, t * BT, TPC * BT, o_k < K, o_i < BT, False)
            store(y, acc[t][1], row_x, t * BT, TPC * BT, o_k < K, o_i < BT, False)
            if LEARNED:
                m_f = (o_k < K) & (o_k * 0 + (i_s + t) * BT < length)
                tl.store(flow + ((i_t + t).to(tl.int64) * HQ + i_q) * K + o_k, acc[t][2], mask=m_f)
