"""States alone.

A scan's output needs all K channels of the state at once, the state by itself doesn't: here programs share them out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import CHANNEL, NONE, TOKEN, block, kept_row_decay, kept_tile_decay
from gla_ablate.ops.kernels.lookback import in_order, look_back, publish
from gla_ablate.ops.kernels.places import entering, segment_at, sequence_at

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)
_TOKEN = tl.constexpr(TOKEN)


@triton.jit
def weighed(b_x, into, out, scale, GATE: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr):
    """What is written: x with the decay to the tile's end, backward in time to its start; channels have it in b."""
    if GATE == _CHANNEL:
        b_z = b_x.to(DTYPE)
    elif GATE == _NONE:
        b_z = (b_x.to(tl.float32) * scale).to(DTYPE) if REVERSE else b_x.to(DTYPE)
    else:
        b_z = into * scale if REVERSE else out
        b_z = (b_x.to(tl.float32) * b_z[:, None]).to(DTYPE)
    return b_z


@triton.jit
def state_step(
    b_s, through, b, x, g, decay, value_decay, states, i_s, i_k, i_v, i_b, first, length, n_tiles, t_base, c_base,
    scale, H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, STORE: tl.constexpr,
    VALUED: tl.constexpr, DESC: tl.constexpr, DESC_X: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state and what gets through, after one more tile; STORE: the state before it is kept if a chunk meets it."""
    HB: tl.constexpr = H * GROUP if REVERSE else H
    TILED: tl.constexpr = GATE == _CHANNEL
    MASK: tl.constexpr = DESC and not TILED and not DESC_X
    i_h = i_b // GROUP if REVERSE else i_b
    o_i = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v, m_i, m_t = o_k < K, o_v < V, o_i < BT, i_s * BT + o_i < length
    i_t = t_base + i_s
    row_x = first + i_s * BT
    row_tile = (i_t.to(tl.int64) * HB + i_b) * BT
    if VALUED:
        b_x = block(x, row_tile, i_v * BV, V, m_i, m_v, False)
    else:
        b_x = block(x, row_x, i_b * V + i_v * BV, HB * V, m_t, m_v, DESC_X)
    if TILED:
        row_b, col_b, width_b, m_r = row_tile, 0, K, m_i
    else:
        row_b, col_b, width_b, m_r = row_x, i_b * K, HB * K, m_t
    into, out = 1.0, 1.0
    if GATE != _NONE and GATE != _CHANNEL:
        into, out = kept_row_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
    if STORE:  # noqa: SIM102 (known when compiled, which the next isn't)
        if (i_s == n_tiles - 1) | (i_s % TPC == TPC - 1) if REVERSE else i_s % TPC == 0:
            p_s = states + ((c_base + i_s // TPC).to(tl.int64) * HB + i_b) * K * V
            kept = b_s.to(states.dtype.element_ty)
            tl.store(p_s + o_v[:, None] * K + o_k[None, :], kept, mask=m_v[:, None] & m_k[None, :])
    b_z = weighed(b_x, into, out, scale, GATE, REVERSE, DTYPE)
    b_b = block(b, row_b, col_b + i_k * BK, width_b, m_r, m_k, DESC).to(DTYPE)
    if MASK:
        b_b = tl.where(m_r[:, None], b_b, 0.0).to(DTYPE)
    if TILED:
        d = tl.load(decay + (i_t.to(tl.int64) * H + i_h) * K + o_k, mask=m_k, other=0.0)
        b_s *= d[None, :]
        through *= d
    elif GATE != _NONE:
        d = kept_tile_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
        b_s *= d
        through *= d
    if VALUED:
        b_s *= tl.load(value_decay + (i_t.to(tl.int64) * H + i_h) * V + o_v, mask=m_v, other=0.0)[:, None]
    return tl.dot(tl.trans(b_z), b_b, b_s, input_precision=PRECISION), through


@triton.jit(do_not_specialize=["T", "NT", "NC", "SEG", "NSEG"])
def states_kernel(
    b, x, g, decay, value_decay, start, borders, passed, flags, states, end, cu_seqlens, tile_base, chunk_base,
    segments, own_segments, scale, T, NT, NC, SEG, NSEG,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr,
    CUT: tl.constexpr, LOOKS_BACK: tl.constexpr, ENDS: tl.constexpr, VALUED: tl.constexpr, STORE_END: tl.constexpr,
    VARLEN: tl.constexpr, DESC: tl.constexpr, DESC_X: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← decay · S + b̂ᵀ x as in `scan_kernel`, decay too. ENDS: `borders` `[rows, HB, K, V]`, what each segment but
    the last of sequences that are cut would end with if it began with zero, and `passed`, what it lets through, for
    gates on channels `[rows, HB, K]`, a token `[rows, HB]`; all fp32. Else: `states` as `scan_kernel` gives them;
    LOOKS_BACK: as there, passed `[rows, HB]`, flags `[rows, HB, V/BV · K/BK]`. Grid: segments · HB · V/BV · K/BK.

    VALUED: columns of S decay too, by value_decay `[tiles, H, V]`, and x `[tiles, HB, BT, V]` has that decay to its
    tile's border already. STORE_END: end `[N, HB, K, V]`.
    """
    HB: tl.constexpr = H * GROUP if REVERSE else H
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    TILED: tl.constexpr = GATE == _CHANNEL
    tl.static_assert(not LOOKS_BACK or not (CUT or ENDS or VALUED or TILED))
    pid = tl.program_id(0)
    i_k, i_v, i_b, i = pid % NK, (pid // NK) % NV, (pid // (NK * NV)) % HB, pid // (NK * NV * HB)
    i_n, begin, stop, row = segment_at(i, segments, SEG, NSEG, NT, VARLEN)
    if VARLEN:  # noqa: SIM102 (known when compiled, which the next isn't)
        if i_n < 0:
            return
    first, length, t_base, n_tiles, c_base = sequence_at(i_n, cu_seqlens, tile_base, chunk_base, T, NT, NC, BT, VARLEN)
    if ENDS:  # noqa: SIM102 (known when compiled, which the next isn't)
        if begin == 0 if REVERSE else stop == n_tiles:
            return
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_v[:, None] & m_k[None, :]
    through = tl.full([BK], 1.0, dtype=tl.float32) if TILED else 1.0
    if LOOKS_BACK:
        begin, stop, before = in_order(i, i_n, segments, own_segments, SEG, NSEG, NT, REVERSE, VARLEN)
        place, i_slice = row * HB + i_b, i_v * NK + i_k
        if begin > 0 if REVERSE else stop < n_tiles:
            b_e = tl.zeros([BV, BK], dtype=tl.float32)
            for j in tl.range(begin, stop, num_stages=STAGES):
                i_s = begin + stop - 1 - j if REVERSE else j
                b_e, through = state_step(
                    b_e, through, b, x, g, decay, value_decay, states, i_s, i_k, i_v, i_b, first, length, n_tiles,
                    t_base, c_base, scale, H, GROUP, K, V, BT, TPC, BK, BV, GATE, REVERSE, False, VALUED, DESC, DESC_X,
                    DTYPE, PRECISION,
                )  # fmt: skip
            publish(b_e, through, borders, passed, flags, place, i_slice, o_k, o_v, m_s, K, V, NK * NV, GATE)
    b_s = tl.zeros([BV, BK], dtype=tl.float32)
    if HAS_START or CUT:
        p, known = entering(start, borders, i_n, row, begin, stop, n_tiles, i_b, HB, K * V, REVERSE, HAS_START, CUT)
        b_s = tl.load(p + o_k[None, :] * V + o_v[:, None], mask=tl.where(known, m_s, False), other=0.0)
    if LOOKS_BACK:
        b_s = look_back(b_s, borders, passed, flags, place, i_slice, before, o_k, o_v, m_s, HB, K, V, NK * NV, GATE)
    for j in tl.range(begin, stop, num_stages=STAGES):
        i_s = begin + stop - 1 - j if REVERSE else j
        b_s, through = state_step(
            b_s, through, b, x, g, decay, value_decay, states, i_s, i_k, i_v, i_b, first, length, n_tiles, t_base,
            c_base, scale, H, GROUP, K, V, BT, TPC, BK, BV, GATE, REVERSE, not ENDS, VALUED, DESC, DESC_X, DTYPE,
            PRECISION,
        )  # fmt: skip
    if STORE_END:  # noqa: SIM102 (as above)
        if begin == 0 if REVERSE else stop == n_tiles:
            p_e = end + (i_n.to(tl.int64) * HB + i_b) * K * V + o_k[None, :] * V + o_v[:, None]
            tl.store(p_e, b_s, mask=m_s)
    if ENDS:
        p_e = borders + (row.to(tl.int64) * HB + i_b) * K * V + o_k[None, :] * V + o_v[:, None]
        tl.store(p_e, b_s, mask=m_s)
        if TILED:
            if i_v == 0:
                tl.store(passed + (row.to(tl.int64) * HB + i_b) * K + o_k, through, mask=m_k)
        elif GATE == _TOKEN:  # noqa: SIM102 (as above)
            if i_v + i_k == 0:
                tl.store(passed + row * HB + i_b, through)
