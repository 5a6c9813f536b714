r"""The gradients of q, k and g.

dg_t is the sum, over the pairs (i, j) of rows with j < t ≤ i, of P_ij = dA_ij q_i k_j exp(…): each path from a write to
a read that crosses step t. The textbook gets it as a running sum of q·dq − k·dk, in which pairs that don't cross t must
cancel; at strong gates they outweigh the rest by orders of magnitude, and rounding is all that is left. Here a pair is
split, as its decay was, at its anchor: U_i = q_i dq_i collects the pairs that end in row i, L_j = k_j dk_j those that
begin in row j, and

    dg_t += Σ_{i ≥ t} U_i   for rows t after the anchor,    dg_t += Σ_{j < t} L_j   for rows before it,

sums of crossing pairs only: the transpose of `prefix` and `suffix`. Inside a block about its centre the rows do cancel,
so there the pair (i, i), which crosses nothing and outweighs all, stays out and is added to dq and dk elementwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, LOG2E, NONE, channel_decay, head_matrix, locate, row_decay, span

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)


@triton.jit
def load_pair(
    da, first, begin, i_s, j_s, length, i_h, H: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, TRANS: tl.constexpr
):
    """dA of row tile i_s against column tile j_s; TRANS reads it as dAᵀ, `[columns, rows]`."""
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    if TRANS:
        p = ((first + o_t[None, :]) * H + i_h) * (TPC * BT) + ((j_s - begin) * BT + o_i)[:, None]
        b = tl.load(da + p, mask=(o_t < length)[None, :], other=0.0)
    else:
        p = ((first + o_t[:, None]) * H + i_h) * (TPC * BT) + ((j_s - begin) * BT + o_i)[None, :]
        b = tl.load(da + p, mask=(o_t < length)[:, None], other=0.0)
    return b


@triton.jit
def tile_factor(
    a, ag, g, total, first, i_t, i_s, j_s, lo, hi, length, i_h, o_k, scale, READS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """q (READS) or k of another tile of the chunk with the decay between its rows and this tile; a: plain, ag: from
    `prepare`."""
    o_j = j_s * BT + tl.arange(0, BT)
    p = ((first + o_j[:, None]) * H + i_h) * K + o_k[None, :]
    m = (o_j < length)[:, None] & (o_k < K)[None, :]
    if GATE == _CHANNEL:
        d = tl.exp2(span(g, total, first, i_t, i_s, lo, hi, length, i_h, o_k, H, K, BT, GATE))
        b = tl.load(ag + p, mask=m, other=0.0).to(tl.float32) * d[None, :]
    else:
        b = tl.load(a + p, mask=m, other=0.0).to(tl.float32) * scale
        if GATE != _NONE:
            prefix, suffix = row_decay(g, first, j_s, length, i_h, H, BT, GATE)
            d = span(g, total, first, i_t, i_s, lo, hi, length, i_h, o_k, H, K, BT, GATE)
            b *= tl.exp2((prefix if READS else suffix) + d)[:, None]
    return b


@triton.jit
def crossing(z, w: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """Inside each w rows: Σ_{i ≥ t} z_i where the segment lies after its anchor (odd), Σ_{j < t} z_j where before
    (even)."""
    o_i = tl.arange(0, BT)
    segment = (o_i // w)[:, None] == (o_i // w)[None, :]
    after = ((o_i // w) % 2 == 1)[:, None]
    later = o_i[None, :] >= o_i[:, None]
    take = segment & ((after & later) | ((after | later) == 0))
    return tl.dot(take.to(tl.float32), z, input_precision=PRECISION)


@triton.jit
def half_pairs(
    b_q, b_k, b_da, b_dat, g, first, i_s, length, i_h, o_k, w: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs of `half_scores` give to dq / scale, dk and dg `[BT, BK]`."""
    o_i = tl.arange(0, BT)
    prefix, suffix = channel_decay(g, first, i_s, length, i_h, o_k, w, -float("inf"), H, K, BT)
    upper = ((o_i // w) % 2 == 1)[:, None]
    decay = tl.exp2(tl.where(upper, prefix, suffix))
    b_qe = tl.where(upper, b_q * decay, 0.0).to(DTYPE)
    b_ke = tl.where(upper, 0.0, b_k * decay).to(DTYPE)
    pair = (o_i // (2 * w))[:, None] == (o_i // (2 * w))[None, :]
    b_u = tl.dot(tl.where(pair, b_da, 0.0).to(DTYPE), b_ke, input_precision=PRECISION)
    b_l = tl.dot(tl.where(pair, b_dat, 0.0).to(DTYPE), b_qe, input_precision=PRECISION)
    # rows of the other half got sums, too, of pairs that this level doesn't hold: drop them
    b_z = tl.where(upper, b_u, b_l) * decay
    b_dg = crossing(b_z * tl.where(upper, b_q, b_k), w, BT, PRECISION)
    return tl.where(upper, b_z, 0.0), tl.where(upper, 0.0, b_z), b_dg


@triton.jit
def near_pairs(
    b_q, b_k, da, g, first, begin, i_s, length, i_h, o_k, bound,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq / scale, dk, dg `[BT, BK]` from the pairs inside one tile, gates on channels; b_q is scaled. Mirrors
    `diagonal_scores`."""
    o_i = tl.arange(0, BT)
    b_da = load_pair(da, first, begin, i_s, i_s, length, i_h, H, BT, TPC, False)
    b_dat = load_pair(da, first, begin, i_s, i_s, length, i_h, H, BT, TPC, True)
    self_da = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_da, 0.0), axis=1)[:, None]
    b_dq = self_da * b_k
    b_dk = self_da * b_q
    b_dg = tl.zeros_like(b_q)
    for level in tl.static_range(LEVELS):
        h_q, h_k, h_g = half_pairs(
            b_q, b_k, b_da, b_dat, g, first, i_s, length, i_h, o_k, BT >> (level + 1), H, K, BT, DTYPE, PRECISION
        )
        b_dq += h_q
        b_dk += h_k
        b_dg += h_g
    half: tl.constexpr = BLOCK // 2
    prefix, suffix = channel_decay(g, first, i_s, length, i_h, o_k, half, bound, H, K, BT)
    upper = ((o_i // half) % 2 == 1)[:, None]
    d = tl.where(upper, prefix, -suffix)
    b_qe = b_q * tl.exp2(d)
    b_ke = b_k * tl.exp2(-d)
    block = (o_i // BLOCK)[:, None] == (o_i // BLOCK)[None, :]
    earlier = o_i[:, None] > o_i[None, :]
    b_u = tl.dot(tl.where(block & earlier, b_da, 0.0), b_ke, input_precision=PRECISION)
    b_l = tl.dot(tl.where(block & (o_i[:, None] < o_i[None, :]), b_dat, 0.0), b_qe, input_precision=PRECISION)
    b_dq += b_u * tl.exp2(d)
    b_dk += b_l * tl.exp2(-d)
    b_z = b_qe * b_u - b_ke * b_l
    # where a step was cut at the bound, the pairs across it were too heavy by exp(bound − g)
    o_t = i_s * BT + o_i
    p_g = g + ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :]
    b_g = tl.load(p_g, mask=(o_t < length)[:, None] & (o_k < K)[None, :], other=0.0) * LOG2E
    b_dg += crossing(tl.where(upper, b_z, -b_z), half, BT, PRECISION) * tl.exp2(tl.minimum(b_g - bound, 0.0))
    return b_dq, b_dk, b_dg


@triton.jit(do_not_specialize=["T", "NT", "NC", "n_rows"])
def gradient_kernel(
    q, k, qg, kg, g, total, x, y, da, flow, dq, dk, dg, cu_seqlens, tiles, chunk_base, scale, bound, T, NT, NC, n_rows,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk `[B, T, H, K]` and dg: `[B, T, H, K]`, or `[K/BK, B, T, H]` (to be summed over slices) for gates without
    channels.

    x, y, flow from `products_kernel`, da = do vᵀ from `scores_kernel`. Grid: tiles · H · K/BK.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k, i_h, i_t = pid % NK, (pid // NK) % H, pid // (NK * H)
    i_n, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    c_base = tl.load(chunk_base + i_n) if VARLEN else i_n * NC
    chunk = (c_base + i_s // TPC).to(tl.int64) * H + i_h
    begin = i_s // TPC * TPC
    end = tl.minimum(begin + TPC, tl.cdiv(length, BT))
    o_i = tl.arange(0, BT)
    o_t = i_s * BT + o_i
    o_k = i_k * BK + tl.arange(0, BK)
    m_t, m_k = o_t < length, o_k < K
    p = ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :]
    m = m_t[:, None] & m_k[None, :]
    b_q = tl.load(q + p, mask=m, other=0.0).to(tl.float32)
    b_k = tl.load(k + p, mask=m, other=0.0).to(tl.float32)

    # pairs across the tile's borders: with the states, then with the other tiles of the chunk
    b_u = tl.load(x + p, mask=m, other=0.0).to(tl.float32)  # what row i reads, from before the tile
    b_l = tl.load(y + p, mask=m, other=0.0).to(tl.float32)  # what row j's write becomes, after the tile
    if GATE != _NONE:
        before = tl.exp2(span(g, total, first, i_t, i_s, begin, i_s, length, i_h, o_k, H, K, BT, GATE))
        behind = tl.exp2(span(g, total, first, i_t, i_s, i_s + 1, end, length, i_h, o_k, H, K, BT, GATE))
        whole = tl.exp2(span(g, total, first, i_t, i_s, i_s, i_s + 1, length, i_h, o_k, H, K, BT, GATE))
        b_f = tl.load(flow + chunk * K + o_k, mask=m_k, other=0.0)
        through = b_f * before * whole * behind  # [BK]: pairs that pass over the tile, first those from state to state
        b_u *= before[None, :] if GATE == _CHANNEL else before
        b_l *= behind[None, :] if GATE == _CHANNEL else behind
    if TPC > 1:
        for j_s in range(begin, i_s):
            b_ke = tile_factor(
                k, kg, g, total, first, i_t, i_s, j_s, j_s + 1, i_s, length, i_h, o_k, 1.0, False, H, K, BT, GATE
            )
            b_da = load_pair(da, first, begin, i_s, j_s, length, i_h, H, BT, TPC, False)
            b_u += tl.dot(b_da.to(DTYPE), b_ke.to(DTYPE), input_precision=PRECISION)
            if GATE != _NONE:
                p_j = ((first + j_s * BT + o_i[:, None]) * H + i_h) * K + o_k[None, :]
                b_y = tl.load(y + p_j, mask=m_k[None, :], other=0.0).to(tl.float32)
                through += tl.sum(b_ke * b_y, axis=0) * whole * behind
        for j_s in range(i_s + 1, end):
            b_qe = tile_factor(
                q, qg, g, total, first, i_t, i_s, j_s, i_s + 1, j_s, length, i_h, o_k, scale, True, H, K, BT, GATE
            )
            b_da = load_pair(da, first, begin, j_s, i_s, length, i_h, H, BT, TPC, True)
            b_l += tl.dot(b_da.to(DTYPE), b_qe.to(DTYPE), input_precision=PRECISION)
            if GATE != _NONE:
                o_j = j_s * BT + o_i
                p_j = ((first + o_j[:, None]) * H + i_h) * K + o_k[None, :]
                b_x = tl.load(x + p_j, mask=(o_j < length)[:, None] & m_k[None, :], other=0.0).to(tl.float32)
                through += tl.sum(b_qe * b_x, axis=0) * whole * before
                for l_s in range(begin, i_s):  # from an earlier tile, over this one, to a later
                    b_ke = tile_factor(
                        k, kg, g, total, first, i_t, i_s, l_s, l_s + 1, i_s, length, i_h, o_k, 1.0, False,
                        H, K, BT, GATE,
                    )  # fmt: skip
                    b_da = load_pair(da, first, begin, j_s, l_s, length, i_h, H, BT, TPC, False)
                    b_u_j = tl.dot(b_da.to(DTYPE), b_ke.to(DTYPE), input_precision=PRECISION)
                    through += tl.sum(b_qe * b_u_j, axis=0) * whole

    b_q *= scale
    if GATE == _CHANNEL:
        prefix, suffix = channel_decay(g, first, i_s, length, i_h, o_k, BT, -float("inf"), H, K, BT)
        b_u *= tl.exp2(prefix)
        b_l *= tl.exp2(suffix)
        later = (o_i[None, :] >= o_i[:, None]).to(tl.float32)
        b_dg = tl.dot(later, b_q * b_u, input_precision=PRECISION) + through[None, :]
        b_dg += tl.dot(1.0 - later, b_k * b_l, input_precision=PRECISION)
        n_q, n_k, n_g = near_pairs(
            b_q, b_k, da, g, first, begin, i_s, length, i_h, o_k, bound, H, K, BT, TPC, BLOCK, LEVELS, DTYPE, PRECISION
        )
        b_u += n_q
        b_l += n_k
        tl.store(dg + p, b_dg + n_g, mask=m)
    else:
        b_da = load_pair(da, first, begin, i_s, i_s, length, i_h, H, BT, TPC, False)
        b_dat = load_pair(da, first, begin, i_s, i_s, length, i_h, H, BT, TPC, True)
        self_da = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_da, 0.0), axis=1)[:, None]
        b_da = tl.where(o_i[:, None] > o_i[None, :], b_da, 0.0)
        b_dat = tl.where(o_i[:, None] < o_i[None, :], b_dat, 0.0)
        if GATE != _NONE:
            prefix, suffix = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
            b_u *= tl.exp2(prefix)[:, None]
            b_l *= tl.exp2(suffix)[:, None]
            ended = tl.sum(b_q * b_u, axis=1)
            begun = tl.sum(b_k * b_l, axis=1)
            later = o_i[None, :] >= o_i[:, None]
            b_da *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, False))
            b_dat *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, True))
        n_q = tl.dot(b_da.to(DTYPE), b_k.to(DTYPE), input_precision=PRECISION)
        n_k = scale * tl.dot(b_dat.to(DTYPE), tl.load(q + p, mask=m, other=0.0).to(DTYPE), input_precision=PRECISION)
        if GATE != _NONE:
            # pairs inside the tile, the self pairs left out: each counts +P at its end and −P at its beginning
            ended += tl.sum(b_q * n_q - b_k * n_k, axis=1)
            eye = o_i[:, None] == o_i[None, :]  # turns a vector over rows into one over columns
            ended = tl.sum(tl.where(eye, ended[:, None], 0.0), axis=0)
            begun = tl.sum(tl.where(eye, begun[:, None], 0.0), axis=0)
            b_dg = tl.sum(tl.where(later, ended[None, :], begun[None, :]), axis=1) + tl.sum(through)
            p_g = dg + i_k.to(tl.int64) * n_rows * H + (first + o_t) * H + i_h
            tl.store(p_g, b_dg, mask=m_t)
        b_u += n_q + self_da * b_k
        b_l += n_k + self_da * b_q
    tl.store(dq + p, (b_u * scale).to(dq.dtype.element_ty), mask=m)
    tl.store(dk + p, b_l.to(dk.dtype.element_ty), mask=m)
