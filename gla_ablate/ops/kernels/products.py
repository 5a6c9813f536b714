"""What the gradients of q, k and g take from the states, X = S do, Y = dS v and Σ_v S ∘ dS, and dA = do vᵀ.

States are kept at the borders of chunks alone. Where a chunk is two tiles, what a row meets at its own tile's border is
what it would meet at the chunk's, decayed by the other tile, and what the other tile wrote: its scores with that tile,
dA, are at hand. So no state inside a chunk is formed, and only pairs inside one tile are left to the gradient kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, NONE, block, chunk_of, locate, row_decay, store, tile_decay

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)


@triton.jit
def through(decay, tile, o_k, there, K: tl.constexpr):
    """What a tile lets through `[BK]`, gates on channels; 1 if it isn't there."""
    # o_k * 0: the interpreter takes no mask that mixes a block with a lone boolean
    return tl.load(decay + tile * K + o_k, mask=(o_k < K) & (o_k * 0 + there > 0), other=1.0)


@triton.jit
def bordered(p, factor, tile, o_i, row, o_r, i_h, o_k, m, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
             GATE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """q̂ or k̂ `[R, BK]` in rows m, zero in others: gates on channels have it in memory, the rest multiply by factor."""
    p_r = (tile * BT + o_i) * K if GATE == _CHANNEL else ((row + o_r) * H + i_h) * K
    b = tl.load(p + p_r[:, None] + o_k[None, :], mask=m[:, None] & (o_k < K)[None, :], other=0.0)
    if GATE != _CHANNEL:
        b = b.to(tl.float32) * factor[:, None]
    return b.to(DTYPE)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def products_kernel(
    do, v, h, dh, read, write, g, decay, x, y, flow, da, cu_seqlens, tiles, chunk_base, scale, T, NT, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x = Xᵀ `[chunks, H, K, C]`, y = Y `[chunks, H, C, K]` without the decay inside their tile; flow `[tiles, H, K]` =
    Σ_v S ∘ dS, what a tile meets and what becomes of it; da = dAᵀ `[tiles, H, BT, BT]`.

    h, dh `[chunks, H, V, K]`: the state at the chunk's start, the gradient at its end; read, write: q, k, or qg, kg for
    gates on channels. TPC, tiles a chunk, is 1 or 2. DESC: do, v, h, dh, x, y are tensor descriptors, whose rows past a
    sequence's end are of no use and do no harm. Grid: tiles · H · K/BK, one program a chunk and slice of K.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    R: tl.constexpr = TPC * BT
    FOLD: tl.constexpr = min(BV, 16)
    pid = tl.program_id(0)
    i_k, i_h, i_t = pid % NK, (pid // NK) % H, pid // (NK * H)
    i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if (i_s * BT >= length) | (i_s % TPC != 0):
        return
    chunk = chunk_of(i_n, i_s, i_h, chunk_base, NC, H, TPC, VARLEN)
    o_r = tl.arange(0, R)
    o_k = i_k * BK + tl.arange(0, BK)
    m_r, m_k = i_s * BT + o_r < length, o_k < K
    row = first + i_s * BT
    b_x = tl.zeros([BK, R], dtype=tl.float32)
    b_y = tl.zeros([R, BK], dtype=tl.float32)
    b_a = tl.zeros([R, R], dtype=tl.float32)
    folded = tl.zeros([FOLD, BK], dtype=tl.float32)
    for i_v in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        col = i_h * V + i_v * BV
        m_v = i_v * BV + tl.arange(0, BV) < V
        b_do = block(do, row, col, H * V, m_r, m_v, DESC).to(DTYPE)
        b_v = block(v, row, col, H * V, m_r, m_v, DESC).to(DTYPE)
        b_h = block(h, chunk * V + i_v * BV, i_k * BK, K, m_v, m_k, DESC)
        b_dh = block(dh, chunk * V + i_v * BV, i_k * BK, K, m_v, m_k, DESC)
        b_x = tl.dot(tl.trans(b_h), tl.trans(b_do), b_x, input_precision=PRECISION)
        b_y = tl.dot(b_v, b_dh, b_y, input_precision=PRECISION)
        b_a = tl.dot(b_v, tl.trans(b_do), b_a, input_precision=PRECISION)
        if GATE != _NONE:  # over as many rows as a thread has: what is left of the sum crosses warps, once, at the end
            folded += tl.sum(tl.reshape(b_h.to(tl.float32) * b_dh.to(tl.float32), [BV // FOLD, FOLD, BK]), axis=0)

    o_i, t = o_r % BT, o_r // BT
    tile = (i_t + t).to(tl.int64) * H + i_h  # [R]
    b_a = tl.where(m_r[:, None] & m_r[None, :], b_a, 0.0)
    if i_k == 0:
        p_a = da + (tile * BT + o_i)[:, None] * BT + o_i[None, :]
        m_a = (t[:, None] == t[None, :]) & ((i_s + t) * BT < length)[:, None]
        tl.store(p_a, b_a.to(da.dtype.element_ty), mask=m_a)
    i_f = (i_t.to(tl.int64) * H + i_h) * K + o_k
    if TPC == 1:
        if GATE != _NONE:
            tl.store(flow + i_f, tl.sum(folded, axis=0), mask=m_k)
    else:
        second = (i_s + 1) * BT < length
        pairs = tl.where((t == 0)[:, None] & (t == 1)[None, :], b_a, 0.0).to(DTYPE)  # [j, i]
        tile_1, tile_2 = i_t.to(tl.int64) * H + i_h, (i_t + 1).to(tl.int64) * H + i_h
        f_q, f_k = o_r * 0.0 + scale, o_r * 0.0 + 1.0
        if GATE == _CHANNEL:
            d_1, d_2 = through(decay, tile_1, o_k, 1, K), through(decay, tile_2, o_k, second.to(tl.int32), K)
        else:
            d_1 = o_k * 0.0 + tile_decay(g, first, i_s, length, i_h, H, BT, GATE)
            d_2 = o_k * 0.0 + tile_decay(g, first, i_s + 1, length, i_h, H, BT, GATE)
            if GATE != _NONE:
                prefix, suffix = row_decay(g, first, i_s, length, i_h, H, BT, TPC, GATE)
                f_q, f_k = tl.exp2(prefix) * scale, tl.exp2(suffix)
        b_k = bordered(write, f_k, tile, o_i, row, o_r, i_h, o_k, m_r & (t == 0), H, K, BT, GATE, DTYPE)
        b_q = bordered(read, f_q, tile, o_i, row, o_r, i_h, o_k, m_r & (t == 1), H, K, BT, GATE, DTYPE)
        if GATE != _NONE:
            whole = tl.sum(folded, axis=0)
            tl.store(flow + i_f, d_2 * whole + tl.sum(tl.trans(b_q).to(tl.float32) * b_x, axis=1), mask=m_k)
            f_2 = d_1 * whole + tl.sum(b_k.to(tl.float32) * b_y, axis=0)
            tl.store(flow + H * K + i_f, f_2, mask=m_k & (o_k * 0 + second.to(tl.int32) > 0))
        b_y = tl.dot(pairs, b_q, b_y * tl.where((t == 0)[:, None], d_2[None, :], 1.0), input_precision=PRECISION)
        # not onto a decayed b_x, as above: registers that are written between two products make the compiler wait
        # after every product of the kernel
        b_z = tl.dot(tl.trans(b_k), pairs, input_precision=PRECISION)
        b_x = tl.fma(b_x, tl.where((t == 1)[None, :], d_1[:, None], 1.0), b_z)
    m_i = o_r < R
    store(y, b_y, chunk * R, i_k * BK, K, m_i, m_k, DESC)
    store(x, b_x, chunk * K + i_k * BK, 0, R, m_k, m_i, DESC)
