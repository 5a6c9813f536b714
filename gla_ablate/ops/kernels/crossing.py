"""Gates on value channels: what crosses the borders of tiles, along either axis of the state."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import chunk_of, locate, store
from gla_ablate.ops.kernels.products import factors


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def crossing_kernel(
    h, dh, read, write, g, decay, x, y, flow, tiles, scale, T, NT, NC,
    H: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SUMMED: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    BT: tl.constexpr, KEYS: tl.constexpr, BOTH: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x `[tiles, HQ, ROWS, BT]` = S read̂ᵀ, and BOTH: y = dS writêᵀ and flow `[tiles, HQ, ROWS]` = Σ S ∘ dS ∘ decay
    over the other axis. KEYS: rows are K's channels and the sum goes over V's, so that read and write are do and v;
    else rows are V's, and they are q and k. read̂ and writê have the decay of the axis that is summed to their tile's
    border; that of the rows is left to `channel_gradient_kernel`, and so is all that doesn't leave its tile.

    h `[tiles, H, V, K]`: the state at the tile's start; dh `[tiles, HQ, V, K]`: the gradient of that at its end.
    Grid: tiles · HQ · ROWS/BR.
    """
    HQ: tl.constexpr = H * GROUP
    NR: tl.constexpr = (ROWS + BR - 1) // BR
    LEAP_R: tl.constexpr = 1 if KEYS else SUMMED  # from row to row of h, and from number to number of its sums
    LEAP_S: tl.constexpr = ROWS if KEYS else 1
    pid = tl.program_id(0)
    i_r, i_q, i_t = pid % NR, (pid // NR) % HQ, pid // (NR * HQ)
    i_h = i_q // GROUP
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    chunk = chunk_of(i_t, i_s, tiles, NT, NC, 1, VARLEN)
    own = chunk * HQ + i_q
    o_i = tl.arange(0, BT)
    o_r = i_r * BR + tl.arange(0, BR)
    m_r = o_r < ROWS
    b_x, b_y = tl.zeros([BR, BT], dtype=tl.float32), tl.zeros([BR, BT], dtype=tl.float32)
    b_f = tl.zeros([BR], dtype=tl.float32)
    for i in tl.range(0, tl.cdiv(SUMMED, BS), num_stages=STAGES):
        o_s = i * BS + tl.arange(0, BS)
        # a tuple of one, whose parts the compiler wants to see unpacked
        b_a, b_b, d = factors(
            read, write, g, decay, first, i_t, i_s, length, i_q, o_s, scale, 1, H, GROUP, SUMMED, BT, GATE, DTYPE
        )[0]
        place = o_r[:, None] * LEAP_R + o_s[None, :] * LEAP_S
        m = m_r[:, None] & (o_s < SUMMED)[None, :]
        b_h = tl.load(h + (chunk * H + i_h) * ROWS * SUMMED + place, mask=m, other=0.0)
        b_x = tl.dot(b_h.to(DTYPE), b_a, b_x, input_precision=PRECISION)
        if BOTH:
            b_dh = tl.load(dh + own * ROWS * SUMMED + place, mask=m, other=0.0)
            b_y = tl.dot(b_dh.to(DTYPE), b_b, b_y, input_precision=PRECISION)
            b_p = b_h.to(tl.float32) * b_dh.to(tl.float32)
            b_f += tl.sum(b_p * through(d, BS)[None, :], axis=1)
    store(x, b_x, own * ROWS + i_r * BR, 0, BT, m_r, o_i < BT, False)
    if BOTH:
        store(y, b_y, own * ROWS + i_r * BR, 0, BT, m_r, o_i < BT, False)
        tl.store(flow + (i_t.to(tl.int64) * HQ + i_q) * ROWS + o_r, b_f, mask=m_r)


@triton.jit
def through(d, N: tl.constexpr):
    """A tile's decay as `[N]`, also where it is one number for all channels."""
    return tl.zeros([N], dtype=tl.float32) + d
