r"""The gradients of q, k and g for gates on channels.

dg_t is the sum, over the pairs (i, j) of rows with j < t ≤ i, of P_ij = dA_ij q_i k_j exp(…): each path from a write to
a read that crosses step t. With U_i = Σ_j P_ij what row i reads and L_j = Σ_i P_ij what row j's write becomes, it is
what passes over the tile or leaves it, plus Σ_{i ≥ t} (U_i − L_i), in which a pair that doesn't cross t must cancel. It
does, because both sides are formed, pair group by pair group, from the same rounded factors; pairs that leave the tile
enter as what they are, so that no sum outgrows what crosses the tile's own steps. The pair (i, i) crosses nothing: it
stays out of every product and is added to dq and dk elementwise.

That leaves a rounding of what cancels, fp32's for bf16 inputs, of tf32's size for fp16, below that of the factors. For
fp32 inputs (EXACT) steep tiles take the sum outward from each anchor instead, which holds crossing pairs alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import locate
from gla_ablate.ops.kernels.decay import (
    between,
    centred,
    inputs,
    is_later,
    matrices,
    parts,
    rounded,
    summed,
)


@triton.jit
def both_ways(da, tile, BT: tl.constexpr, DTYPE: tl.constexpr):
    """dA of a tile and its transpose in one `[BT, BT]`, and its diagonal `[BT, 1]`."""
    o_i = tl.arange(0, BT)
    p = da + tile * BT * BT
    b_a = tl.where(
        o_i[:, None] >= o_i[None, :],
        tl.load(p + o_i[:, None] * BT + o_i[None, :]),
        tl.load(p + o_i[None, :] * BT + o_i[:, None]),
    )
    return b_a.to(DTYPE), tl.load(p + o_i[:, None] * (BT + 1)).to(tl.float32)


@triton.jit(do_not_specialize=["T", "NT"])
def channel_gradient_kernel(
    q, k, g, halves, x, y, da, flow, dq, dk, dg, steep, sums, cu_seqlens, tiles, scale, T, NT,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg `[B, T, H, K]` of tiles not marked steep, with the anchor of `prepare_kernel`, from x, y, flow and da
    of `products_kernel`. Grid: tiles · H.
    """
    pid = tl.program_id(0)
    i_h, i_t = pid % H, pid // H
    _i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    tile = i_t.to(tl.int64) * H + i_h
    if tl.load(steep + tile) != 0:
        return
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    b_a, b_self = both_ways(da, tile, BT, DTYPE)
    b_lower = tl.where(o_i[:, None] > o_i[None, :], b_a, 0.0).to(DTYPE)
    b_upper = tl.where(o_i[:, None] < o_i[None, :], b_a, 0.0).to(DTYPE)
    take = matrices(sums, 0, 3, BT)
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        p, m, b_g, b_q, b_k = inputs(q, k, g, first, o_t, length, i_h, o_k, scale, H, K)
        d = summed(take[2], parts(b_g, DTYPE))
        e, f = tl.exp2(d), tl.exp2(-d)
        b_e, b_f = b_q * e, b_k * f
        b_u = tl.dot(b_lower, b_f.to(DTYPE), input_precision=PRECISION)
        b_l = tl.dot(b_upper, b_e.to(DTYPE), input_precision=PRECISION)
        b_e, b_f = rounded(b_e, DTYPE), rounded(b_f, DTYPE)
        early = tl.load(halves + 2 * tile * K + o_k, mask=m_k, other=0.0)
        late = tl.load(halves + (2 * tile + 1) * K + o_k, mask=m_k, other=0.0)
        b_x = tl.load(x + p, mask=m, other=0.0).to(tl.float32) * early[None, :]
        b_y = tl.load(y + p, mask=m, other=0.0).to(tl.float32) * late[None, :]
        through = tl.load(flow + tile * K + o_k, mask=m_k, other=0.0) * early * late
        # over row t: what is read from it on, less what its own tile wrote from it on; what leaves from before it
        b_z = b_e * (b_u + b_x) - b_f * b_l
        b_dg = summed(tl.trans(take[0]), parts(b_z, DTYPE)) + summed(tl.trans(take[1]), parts(b_f * b_y, DTYPE))
        b_dq = e * (b_u + b_x) + b_self * b_k
        b_dk = f * (b_l + b_y) + b_self * b_q
        tl.store(dq + p, (b_dq * scale).to(dq.dtype.element_ty), mask=m)
        tl.store(dk + p, b_dk.to(dk.dtype.element_ty), mask=m)
        tl.store(dg + p, b_dg + through[None, :], mask=m)


@triton.jit
def meetings(b_a, level: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """The pairs of dA that meet at each level of the tree, from blocks on; one tile of no use if there is no level."""
    one = (tl.where(between(BLOCK << level, b_a.shape[0]), b_a, 0.0).to(b_a.dtype),)
    if level + 1 >= LEVELS:
        return one
    else:
        return one + meetings(b_a, level + 1, LEVELS, BLOCK)


@triton.jit(do_not_specialize=["T", "NT"])
def steep_gradient_kernel(
    q, k, g, decay, x, y, da, flow, dq, dk, dg, steep, sums, cu_seqlens, tiles, scale, bound, T, NT,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for tiles marked steep, with the anchors of `steep_prepare_kernel`."""
    pid = tl.program_id(0)
    i_h, i_t = pid % H, pid // H
    _i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    tile = i_t.to(tl.int64) * H + i_h
    if tl.load(steep + tile) == 0:
        return
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i

    b_a, b_self = both_ways(da, tile, BT, DTYPE)  # every product below takes its pairs from one side or both
    block = o_i[:, None] // BLOCK == o_i[None, :] // BLOCK
    b_lower = tl.where(block & (o_i[:, None] > o_i[None, :]), b_a, 0.0).to(DTYPE)
    b_upper = tl.where(block & (o_i[:, None] < o_i[None, :]), b_a, 0.0).to(DTYPE)
    pairs = meetings(b_a, 0, LEVELS, BLOCK)
    take = matrices(sums, 0, LEVELS + 4, BT)

    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        o_k = i_k * BK + tl.arange(0, BK)
        p, m, b_g, b_q, b_k = inputs(q, k, g, first, o_t, length, i_h, o_k, scale, H, K)
        g_parts = parts(b_g, DTYPE)

        # pairs across the tile's borders
        b_dq = tl.load(x + p, mask=m, other=0.0).to(tl.float32) * tl.exp2(summed(take[0], g_parts))
        b_dk = tl.load(y + p, mask=m, other=0.0).to(tl.float32) * tl.exp2(summed(take[1], g_parts))
        p_k = tile * K + o_k
        through = tl.load(flow + p_k, mask=o_k < K, other=0.0) * tl.load(decay + p_k, mask=o_k < K, other=0.0)
        # over row t: what is written before it and leaves the tile; then what is read after it and came from outside
        b_dg = summed(tl.trans(take[1]), parts(b_k * b_dk, DTYPE)) + through[None, :]
        b_z = b_q * b_dq

        for level in tl.static_range(LEVELS):
            later = is_later(BLOCK << level, BT)
            b_e = tl.exp2(summed(take[level + 4], g_parts))
            b_f = tl.where(later, b_q, b_k) * b_e
            b_w = tl.dot(pairs[level], b_f.to(DTYPE), input_precision=PRECISION)
            b_p = rounded(b_f, DTYPE) * b_w
            if EXACT:
                b_dg += summed(tl.trans(take[level + 4]), parts(b_p, DTYPE))
            else:
                b_z += tl.where(later, b_p, -b_p)
            b_w *= b_e
            b_dq += tl.where(later, b_w, 0.0)
            b_dk += tl.where(later, 0.0, b_w)
        b_dg += summed(tl.trans(take[0]), parts(b_z, DTYPE))

        e, f = centred(take[3], b_g, bound, BLOCK // 2, DTYPE)
        b_e, b_f = b_q * e, b_k * f
        b_w = tl.dot(b_lower, b_f.to(DTYPE), input_precision=PRECISION)
        b_dq += b_w * e + b_self * b_k
        b_z = rounded(b_e, DTYPE) * b_w
        b_w = tl.dot(b_upper, b_e.to(DTYPE), input_precision=PRECISION)
        b_dk += b_w * f + b_self * b_q
        b_z -= rounded(b_f, DTYPE) * b_w
        # outward from the centre, like the decay; where a step was cut, the pairs across it were too heavy
        b_z = tl.where(is_later(BLOCK // 2, BT), b_z, -b_z)
        b_z = summed(tl.trans(take[3]), parts(b_z, DTYPE))
        b_dg += b_z * tl.exp2(tl.minimum(b_g - bound, 0.0))

        tl.store(dq + p, (b_dq * scale).to(dq.dtype.element_ty), mask=m)
        tl.store(dk + p, b_dk.to(dk.dtype.element_ty), mask=m)
        tl.store(dg + p, b_dg, mask=m)
