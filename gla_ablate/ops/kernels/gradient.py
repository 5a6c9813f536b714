r"""The gradients of q, k and g for gates without channels, and why dg is summed as it is, for every gate.

dg_t is the sum, over the pairs (i, j) of rows with j < t ≤ i, of P_ij = dA_ij q_i k_j exp(…): each path from a write to
a read that crosses step t. The textbook gets it as a running sum of q·dq − k·dk, in which pairs that don't cross t must
cancel; at strong gates they outweigh the rest by orders of magnitude, and rounding is all that is left. Here pairs that
leave the tile enter as what they are: those that pass over it, those that end in its row i at rows t ≤ i, those that
begin in its row j at rows t > j. Only pairs inside the tile count twice, +P at their end and −P at their beginning,
from the same rounded factors; the pair (i, i), which crosses nothing and outweighs all, stays out and is added to dq
and dk elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import NONE, chunk_of, head_matrix, locate, row_decay, tile_decay

_NONE = tl.constexpr(NONE)


@triton.jit(do_not_specialize=["T", "NT", "NC", "n_rows"])
def gradient_kernel(
    q, k, g, x, y, da, flow, dq, dk, dg, cu_seqlens, tiles, chunk_base, scale, T, NT, NC, n_rows,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk `[B, T, H, K]` and dg `[K/BK, B, T, H]` (to be summed over slices) from x, y, flow and da of
    `products_kernel`. Grid: tiles · H · K/BK.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k, i_h, i_t = pid % NK, (pid // NK) % H, pid // (NK * H)
    i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    tile = i_t.to(tl.int64) * H + i_h
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    o_k = i_k * BK + tl.arange(0, BK)
    m_t, m_k = o_t < length, o_k < K
    p = ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :]
    m = m_t[:, None] & m_k[None, :]
    b_q = tl.load(q + p, mask=m, other=0.0)
    b_k = tl.load(k + p, mask=m, other=0.0)
    chunk, o_r = chunk_of(i_n, i_s, i_h, chunk_base, NC, H, TPC, VARLEN), i_s % TPC * BT + o_i
    p_x = x + (chunk * K + o_k[None, :]) * (TPC * BT) + o_r[:, None]
    b_u = tl.load(p_x, mask=m, other=0.0).to(tl.float32)  # what row i reads, from before the tile
    p_y = y + (chunk * (TPC * BT) + o_r[:, None]) * K + o_k[None, :]
    b_l = tl.load(p_y, mask=m, other=0.0).to(tl.float32)  # what row j's write becomes, after the tile
    eye = o_i[:, None] == o_i[None, :]
    p_a = da + tile * BT * BT
    b_at = tl.load(p_a + o_i[:, None] * BT + o_i[None, :]).to(tl.float32)  # [j, i]
    b_a = tl.load(p_a + o_i[None, :] * BT + o_i[:, None]).to(tl.float32)
    self_a = tl.sum(tl.where(eye, b_a, 0.0), axis=1)[:, None]
    b_a = tl.where(o_i[:, None] > o_i[None, :], b_a, 0.0)
    b_at = tl.where(o_i[:, None] < o_i[None, :], b_at, 0.0)
    f_q, f_k = b_q.to(tl.float32) * scale, b_k.to(tl.float32)
    if GATE != _NONE:
        prefix, suffix = row_decay(g, first, i_s, length, i_h, H, BT, 1, GATE)
        b_u *= tl.exp2(prefix)[:, None]
        b_l *= tl.exp2(suffix)[:, None]
        ended = tl.sum(f_q * b_u, axis=1)
        begun = tl.sum(f_k * b_l, axis=1)
        b_a *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, False))
        b_at *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, True))
    n_q = tl.dot(b_a.to(DTYPE), b_k.to(DTYPE), input_precision=PRECISION)
    n_k = scale * tl.dot(b_at.to(DTYPE), b_q.to(DTYPE), input_precision=PRECISION)
    if GATE != _NONE:
        ended += tl.sum(f_q * n_q - f_k * n_k, axis=1)
        ended = tl.sum(tl.where(eye, ended[:, None], 0.0), axis=0)  # a vector over rows turned into one over columns
        begun = tl.sum(tl.where(eye, begun[:, None], 0.0), axis=0)
        b_f = tl.sum(tl.load(flow + tile * K + o_k, mask=m_k, other=0.0))
        b_f *= tile_decay(g, first, i_s, length, i_h, H, BT, GATE)
        later = o_i[None, :] >= o_i[:, None]
        b_dg = tl.sum(tl.where(later, ended[None, :], begun[None, :]), axis=1) + b_f
        tl.store(dg + i_k.to(tl.int64) * n_rows * H + (first + o_t) * H + i_h, b_dg, mask=m_t)
    b_u += n_q + self_a * f_k
    b_l += n_k + self_a * f_q
    tl.store(dq + p, (b_u * scale).to(dq.dtype.element_ty), mask=m)
    tl.store(dk + p, b_l.to(dk.dtype.element_ty), mask=m)
