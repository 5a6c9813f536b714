r"""The gradients of q, k and g for gates on channels.

dg_t is the sum, over the pairs (i, j) of rows with j < t ≤ i, of P_ij = dA_ij q_i k_j exp(…): each path from a write to
a read that crosses step t. With U_i = Σ_j P_ij what row i reads and L_j = Σ_i P_ij what row j's write becomes, it is
what passes over the tile, plus what leaves it, plus Σ_{i ≥ t} (U_i − L_i), in which a pair that doesn't cross t must
cancel. It does to 2^−16 of itself (fp16: 2^−11), because both factors and dA are in two halves of 16 bits, and in a
mild tile no pair outweighs those that cross by more than that leaves room for. The pair (i, i) crosses nothing: it
stays out of every product and is added to dq and dk elementwise.

Everything is transposed, channels by rows `[BK, BT]` (see `gla_ablate.ops.kernels.decay`), and in an order that keeps
as little at a time as possible: registers are what limits how much of this a chip does at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import across, beside, chunk_of, locate, store
from gla_ablate.ops.kernels.decay import collected, gates, matrix, summed
from gla_ablate.ops.kernels.gradient import scores_gradient
from gla_ablate.ops.kernels.parts import parts, product, turned


@triton.jit
def mild_tile(
    q, k, g, halves, x, y, da, flow, dq, dk, dg, sums, tile, own, chunk, row, i_r, left, i_q, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr, STAGES: tl.constexpr, DESC: tl.constexpr, OUT: tl.constexpr, FULL: tl.constexpr,
    ALL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg of one tile of which `left` rows are left, FULL: all. OUT: they are tensor descriptors. ALL: not dq
    alone."""
    HQ: tl.constexpr = H * GROUP
    i_h = i_q // GROUP
    o_i = tl.arange(0, BT)
    m_t = o_i < left
    b_a, b_self = scores_gradient(da, own, BT)
    b_a, b_self = b_a * scale, b_self * scale  # what x brings gets it below
    pairs = parts(tl.where(o_i[:, None] < o_i[None, :], b_a, 0.0), DTYPE)
    upto, middle = matrix(sums, 0, BT, BT), matrix(sums, LEVELS + 3, BT, BT)
    zero = tl.zeros([BK, BT], dtype=tl.float32)
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col, col_k = i_q * K + i_k * BK, i_h * K + i_k * BK
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        early = tl.load(halves + 2 * tile * K + o_k, mask=m_k, other=0.0)[:, None]
        late = tl.load(halves + (2 * tile + 1) * K + o_k, mask=m_k, other=0.0)[:, None]
        if ALL:
            passed = tl.load(flow + own * K + o_k, mask=m_k, other=0.0)[:, None] * early * late
        b_g = gates(g, row, col_k, H * K, m_t, m_k, DESC, FULL)
        d = summed(parts(b_g, DTYPE), middle)
        b_k = across(k, row, col_k, H * K, m_t, m_k, DESC, FULL).to(tl.float32)
        b_u = product(parts(b_k * tl.exp2(-d), DTYPE), pairs, zero, PRECISION)
        b_u += beside(x, chunk * K + i_k * BK, i_r, R, m_k, m_t, DESC, FULL).to(tl.float32) * (early * scale)
        e = tl.exp2(d)
        b_u *= e
        store(dq, tl.trans(b_u + b_self * b_k), row, col, HQ * K, m_t, m_k, OUT)
        if ALL:
            b_q = across(q, row, col, HQ * K, m_t, m_k, DESC, FULL).to(tl.float32)
            b_z = b_q * b_u
            b_l = product(parts(b_q * e, DTYPE), turned(pairs), zero, PRECISION)
            f = tl.exp2(d * -1.0)  # formed anew: the compiler would keep what it takes for the same number
            b_y = beside(y, chunk * K + i_k * BK, i_r, R, m_k, m_t, DESC, FULL).to(tl.float32) * late * f
            ends = tl.sum(b_k * b_y, axis=1)[:, None]
            b_l = b_l * f + b_y
            store(dk, tl.trans(b_l + b_self * b_q), row, col, HQ * K, m_t, m_k, OUT)
            # over row t: what leaves the tile; what is read from t on, less what was written from t on
            b_dg = collected(parts(b_z - b_k * b_l, DTYPE), upto) + (ends + passed)
            store(dg, tl.trans(b_dg), row, col, HQ * K, m_t, m_k, OUT)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def channel_gradient_kernel(
    q, k, g, halves, x, y, da, flow, dq, dk, dg, dq_rows, dk_rows, dg_rows, steep, sums, tiles,
    scale, T, NT, NC,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr, OUT: tl.constexpr,
    WHOLE: tl.constexpr, ALL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg `[B, T, HQ, K]` of tiles not marked steep, with the anchor of `prepare_kernel`, from x, y, flow and da
    of `products_kernel`; dk and dg are to be summed over each group. Grid: tiles · HQ.

    DESC: q, k, g, x, y are tensor descriptors; OUT: dq, dk, dg, too, and for tiles in which a sequence ends they are
    given as dq_rows, dk_rows, dg_rows. WHOLE: none does. ALL: without it dq alone, which takes neither q, y nor flow.
    """
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q, i_t = pid % HQ, pid // HQ
    i_h = i_q // GROUP
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    tile, own = i_t.to(tl.int64) * H + i_h, i_t.to(tl.int64) * HQ + i_q
    if (i_s * BT >= length) | (tl.load(steep + tile) != 0):  # loaded while `locate` loads, not after
        return
    R: tl.constexpr = TPC * BT
    chunk = chunk_of(i_t, i_s, tiles, NT, NC, TPC, VARLEN) * HQ + i_q
    i_r = i_s % TPC * BT
    row, left = first + i_s * BT, length - i_s * BT
    # the copy engine can't leave out rows that are another sequence's
    if WHOLE or not OUT:
        mild_tile(
            q, k, g, halves, x, y, da, flow, dq, dk, dg, sums, tile, own, chunk, row, i_r, left, i_q, scale,
            H, GROUP, K, BT, R, BK, LEVELS, STAGES, DESC, OUT, WHOLE, ALL, DTYPE, PRECISION,
        )  # fmt: skip
    elif left >= BT:
        mild_tile(
            q, k, g, halves, x, y, da, flow, dq, dk, dg, sums, tile, own, chunk, row, i_r, left, i_q, scale,
            H, GROUP, K, BT, R, BK, LEVELS, STAGES, True, True, True, ALL, DTYPE, PRECISION,
        )  # fmt: skip
    else:
        mild_tile(
            q, k, g, halves, x, y, da, flow, dq_rows, dk_rows, dg_rows, sums, tile, own, chunk, row, i_r, left, i_q,
            scale, H, GROUP, K, BT, R, BK, LEVELS, STAGES, True, False, False, ALL, DTYPE, PRECISION,
        )  # fmt: skip
