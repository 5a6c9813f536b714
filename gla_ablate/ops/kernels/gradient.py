r"""The gradients of q, k and g for gates without channels; why dg is summed as it is, for these and for steep tiles.

dg_t is the sum, over the pairs (i, j) of rows with j < t ≤ i, of P_ij = dA_ij q_i k_j exp(…): each path from a write to
a read that crosses step t. The textbook gets it as a running sum of q·dq − k·dk, in which pairs that don't cross t must
cancel; at strong gates they outweigh the rest by orders of magnitude, and rounding is all that is left. Here pairs that
leave the tile enter as what they are: those that pass over it, those that end in its row i at rows t ≤ i, those that
begin in its row j at rows t > j. Only pairs inside the tile count twice, +P at their end and −P at their beginning,
from the same factors; the pair (i, i), which crosses nothing and outweighs all, stays out and is added to dq
and dk elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import (
    HEAD,
    NONE,
    across,
    beside,
    chunk_of,
    head_matrix,
    locate,
    row_decay,
    store,
    tile_decay,
)
from gla_ablate.ops.kernels.parts import parts, product, turned

_HEAD = tl.constexpr(HEAD)
_NONE = tl.constexpr(NONE)


@triton.jit
def scores_gradient(da, tile, BT: tl.constexpr):
    """dAᵀ `[j, i]` of a tile, and its diagonal `[1, BT]`; both fp32."""
    o_i = tl.arange(0, BT)
    p = da + tile * BT * BT
    b_self = tl.load(p + o_i * (BT + 1))[None, :]
    return tl.load(p + o_i[:, None] * BT + o_i[None, :]), b_self


@triton.jit
def tile_gradient(
    q, k, g, x, y, da, flow, dq, dk, dg, tile, chunk, first, i_s, i_r, length, i_q, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, LEARNED: tl.constexpr, STAGES: tl.constexpr, DESC: tl.constexpr, OUT: tl.constexpr,
    FULL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg of one tile. OUT: dq and dk are tensor descriptors; FULL: the sequence doesn't end inside the tile."""
    HQ: tl.constexpr = H * GROUP
    i_h = i_q // GROUP
    o_i = tl.arange(0, BT)
    m_t = i_s * BT + o_i < length
    row = first + i_s * BT
    b_a, b_self = scores_gradient(da, tile, BT)
    b_a = tl.where(o_i[:, None] < o_i[None, :], b_a, 0.0)
    into, out = tl.full([BT], 1.0, dtype=tl.float32), tl.full([BT], 1.0, dtype=tl.float32)
    if GATE != _NONE:
        b_a *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, True))
        into, out = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
    pairs = parts(b_a, DTYPE)  # [j, i]
    zero = tl.zeros([BK, BT], dtype=tl.float32)
    b_z = zero
    begun, passed = tl.zeros([BT], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col, col_k = i_q * K + i_k * BK, i_h * K + i_k * BK
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_k = across(k, row, col_k, H * K, m_t, m_k, DESC, FULL)
        b_u = product((b_k.to(DTYPE),), pairs, zero, PRECISION)
        b_u += beside(x, chunk * K + i_k * BK, i_r, R, m_k, m_t, DESC, FULL).to(tl.float32) * into[None, :]
        b_dq = (b_u + b_self * b_k.to(tl.float32)) * scale
        store(dq, tl.trans(b_dq), row, col, HQ * K, m_t, m_k, OUT)
        b_q = across(q, row, col, HQ * K, m_t, m_k, DESC, FULL)
        b_l = product((b_q.to(DTYPE),), turned(pairs), zero, PRECISION) * scale
        b_q = b_q.to(tl.float32) * scale
        if LEARNED:
            b_z += b_q * b_u - b_k.to(tl.float32) * b_l
        b_y = beside(y, chunk * K + i_k * BK, i_r, R, m_k, m_t, DESC, FULL).to(tl.float32) * out[None, :]
        if LEARNED:
            begun += tl.sum(b_k.to(tl.float32) * b_y, axis=0)
            passed += tl.load(flow + tile * K + o_k, mask=m_k, other=0.0)
        store(dk, tl.trans(b_l + b_y + b_self * b_q), row, col, HQ * K, m_t, m_k, OUT)
    if LEARNED:
        b_f = tl.sum(passed) * tile_decay(g, into, i_s, length, i_h, BT, GATE)
        # over row t: what is read from it on, less what its own tile wrote from it on; what leaves from before it
        ended = tl.sum(b_z, axis=0)
        from_it_on = o_i[None, :] >= o_i[:, None]
        b_dg = tl.sum(tl.where(from_it_on, ended[None, :], begun[None, :]), axis=1) + b_f
        if GATE == _HEAD:
            tl.store(dg + tile, tl.sum(tl.where(m_t, b_dg, 0.0)))
        else:
            tl.store(dg + (row + o_i) * HQ + i_q, b_dg, mask=m_t)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def gradient_kernel(
    q, k, g, x, y, da, flow, dq, dk, dg, dq_rows, dk_rows, tiles, scale, T, NT, NC,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, LEARNED: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr,
    OUT: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk `[B, T, HQ, K]` and dg `[B, T, HQ]` (fixed gates: `[tiles, HQ]`, to be summed over tiles) from x, y, flow
    and da of `products_kernel`; dk and dg are to be summed over each group. Grid: tiles · HQ.

    LEARNED: dg is wanted; without it there is no flow. DESC: q, k, x, y are tensor descriptors; OUT: dq, dk, too, and
    for tiles in which a sequence ends they are given as dq_rows, dk_rows. WHOLE: none does.
    """
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q, i_t = pid % HQ, pid // HQ
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    R: tl.constexpr = TPC * BT
    tile = i_t.to(tl.int64) * HQ + i_q
    chunk = chunk_of(i_t, i_s, tiles, NT, NC, TPC, VARLEN) * HQ + i_q
    i_r = i_s % TPC * BT
    # the copy engine can't leave out rows that are another sequence's
    if WHOLE or not OUT:
        tile_gradient(
            q, k, g, x, y, da, flow, dq, dk, dg, tile, chunk, first, i_s, i_r, length, i_q, scale,
            H, GROUP, K, BT, R, BK, GATE, LEARNED, STAGES, DESC, OUT, WHOLE, DTYPE, PRECISION,
        )  # fmt: skip
    elif (i_s + 1) * BT <= length:
        tile_gradient(
            q, k, g, x, y, da, flow, dq, dk, dg, tile, chunk, first, i_s, i_r, length, i_q, scale,
            H, GROUP, K, BT, R, BK, GATE, LEARNED, STAGES, True, True, True, DTYPE, PRECISION,
        )  # fmt: skip
    else:
        tile_gradient(
            q, k, g, x, y, da, flow, dq_rows, dk_rows, dg, tile, chunk, first, i_s, i_r, length, i_q, scale,
            H, GROUP, K, BT, R, BK, GATE, LEARNED, STAGES, True, False, False, DTYPE, PRECISION,
        )  # fmt: skip
