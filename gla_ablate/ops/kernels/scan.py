"""The pass over a sequence: output and states and, with the roles swapped, the gradients of v and of the states."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import (
    CHANNEL,
    NONE,
    block,
    head_matrix,
    kept_row_decay,
    kept_tile_decay,
    store,
    tile_decay,
)
from gla_ablate.ops.kernels.lookback import in_order, look_back, publish
from gla_ablate.ops.kernels.places import entering, segment_at, sequence_at
from gla_ablate.ops.kernels.states import weighed

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)


@triton.jit
def slices(
    p, known, o_v, i: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LOAD: tl.constexpr,
):  # fmt: skip
    """The state as slices `[BV, BK]` i … N − 1 of its transpose, from `[K, V]` or zero."""
    if LOAD:
        o_k = i * BK + tl.arange(0, BK)
        # not "&": of a lone boolean the interpreter makes an integer
        m = tl.where(known, (o_v < V)[:, None] & (o_k < K)[None, :], False)
        b = tl.load(p + o_k[None, :] * V + o_v[:, None], mask=m, other=0.0).to(tl.float32)
    else:
        b = tl.zeros([o_v.shape[0], BK], dtype=tl.float32)
    if i == N - 1:
        return (b,)
    else:
        return (b,) + slices(p, known, o_v, i + 1, N, BK, K, V, LOAD)


@triton.jit
def own_scores(
    b_b, b_a, g, first, i_s, length, i_h, scale, H: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's scores, rows by b's and columns by a's, as the output takes them: Aᵀ, reversed A."""
    o_i = tl.arange(0, BT)
    acc = tl.zeros([BT, BT], dtype=tl.float32)
    acc = tl.dot(b_b, tl.trans(b_a), acc, input_precision=PRECISION) * scale
    if GATE != _NONE:
        acc *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, not REVERSE))
    seen = o_i[:, None] >= o_i[None, :] if REVERSE else o_i[:, None] <= o_i[None, :]
    return tl.where(seen, acc, 0.0).to(DTYPE)


@triton.jit
def step(
    s, b_x, b_known, b, row, col, width, m_r, decay, d, row_d, i: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    K: tl.constexpr, GATE: tl.constexpr, DESC: tl.constexpr, MASK: tl.constexpr, OWN: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slices i … of S ← decay · S + xᵀ b; b_x `[BT, BV]`. MASK: zero rows of b_x don't suffice, 0 · NaN is NaN. OWN: b
    is one slice, b_known."""
    o_k = i * BK + tl.arange(0, BK)
    b_b = b_known if OWN else block(b, row, col + i * BK, width, m_r, o_k < K, DESC).to(DTYPE)
    if MASK:
        b_b = tl.where(m_r[:, None], b_b, 0.0).to(DTYPE)
    if GATE == _CHANNEL:
        b_s = s[i] * tl.load(decay + row_d * K + o_k, mask=o_k < K, other=0.0)[None, :]
    elif GATE == _NONE:
        b_s = s[i]
    else:
        b_s = s[i] * d
    b_s = tl.dot(tl.trans(b_x), b_b, b_s, input_precision=PRECISION)
    if i == N - 1:
        return (b_s,)
    else:
        return (b_s,) + step(
            s, b_x, b_known, b, row, col, width, m_r, decay, d, row_d, i + 1, N, BK, K, GATE, DESC, MASK, OWN, DTYPE,
            PRECISION,
        )  # fmt: skip


@triton.jit
def tile_step(
    s, a, b, x, scores, g, decay, states, o, i_t, i_s, i_q, i_v, twin, first, length, n_tiles, c_base, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, STORE_STATES: tl.constexpr,
    OWN: tl.constexpr, DESC: tl.constexpr, DESC_X: tl.constexpr, OUTPUT: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's output and, if a chunk begins here, state, or, not OUTPUT, neither; returns the next tile's."""
    HQ: tl.constexpr = H * GROUP
    HA: tl.constexpr = H if REVERSE else HQ
    HB: tl.constexpr = HQ if REVERSE else H
    NS: tl.constexpr = (K + BK - 1) // BK
    TILED: tl.constexpr = GATE == _CHANNEL
    MASK: tl.constexpr = DESC and not TILED and not DESC_X  # a tile's last rows may be another sequence's
    ROWS: tl.constexpr = GATE != _NONE and not TILED
    LATE: tl.constexpr = NS > 1  # the state leaves no registers to keep the decay of rows in
    i_h = i_q // GROUP
    i_a = i_h if REVERSE else i_q
    i_b = i_q if REVERSE else i_h
    o_i = tl.arange(0, BT)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v, m_i, m_t = o_v < V, o_i < BT, i_s * BT + o_i < length
    row_d, row_w = i_t.to(tl.int64) * H + i_h, i_t.to(tl.int64) * HQ + i_q
    row_x = first + i_s * BT
    b_x = block(x, row_x, i_b * V + i_v * BV, HB * V, m_t, m_v, DESC_X)
    if TILED:
        row_a, col_a, width_a = (i_t.to(tl.int64) * HA + i_a) * BT, 0, K
        row_b, col_b, width_b = (i_t.to(tl.int64) * HB + i_b) * BT, 0, K
        m_r = m_i
    else:
        row_a, col_a, width_a = row_x, i_a * K, HA * K
        row_b, col_b, width_b = row_x, i_b * K, HB * K
        m_r = m_t
    into, out, d = 1.0, 1.0, 1.0
    if ROWS and not LATE:
        into, out = kept_row_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
        d = kept_tile_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
    meets = (i_s == n_tiles - 1) | (i_s % TPC == TPC - 1) if REVERSE else i_s % TPC == 0
    if STORE_STATES and OUTPUT:  # noqa: SIM102 (known when compiled, which the next isn't)
        if meets & (twin == 0):
            p_s = states + ((c_base + i_s // TPC).to(tl.int64) * HB + i_b) * K * V
            for n in tl.static_range(NS):
                o_k = n * BK + tl.arange(0, BK)
                b_s = s[n].to(states.dtype.element_ty)
                tl.store(p_s + o_v[:, None] * K + o_k[None, :], b_s, mask=m_v[:, None] & (o_k < K)[None, :])
    b_b = 0.0
    if OWN:
        b_b = block(b, row_b, col_b, width_b, m_r, tl.arange(0, BK) < K, DESC).to(DTYPE)
    if OUTPUT:
        # everything transposed, [BV, BT], so that S comes from registers; A is read as Aᵀ or not: some Tritons
        # miscompile the transpose of a result on its way into a product, but not that of what was loaded
        acc = tl.zeros([BV, BT], dtype=tl.float32)
        for n in tl.static_range(NS):
            m_k = n * BK + tl.arange(0, BK) < K
            b_a = block(a, row_a, col_a + n * BK, width_a, m_r, m_k, DESC).to(DTYPE)
            acc = tl.dot(s[n].to(DTYPE), tl.trans(b_a), acc, input_precision=PRECISION)
        if ROWS:
            if LATE:
                into, out = kept_row_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
            acc *= (out if REVERSE else into)[None, :]
        if not (TILED or REVERSE):
            acc *= scale
        if OWN:
            b_w = own_scores(b_b, b_a, g, first, i_s, length, i_h, scale, H, BT, GATE, REVERSE, DTYPE, PRECISION)
        else:
            b_w = block(scores, row_w * BT, 0, BT, m_i, m_i, DESC).to(DTYPE)
            if not REVERSE:
                b_w = tl.trans(b_w)
        acc = tl.dot(tl.trans(b_x.to(DTYPE)), b_w, acc, input_precision=PRECISION)
        store(o, tl.trans(acc.to(DTYPE)), row_x, i_q * V + i_v * BV, HQ * V, m_t, m_v, DESC_X)
    if ROWS and LATE:
        into, out = kept_row_decay(g, decay, i_t, i_s, length, i_h, H, BT, GATE)
        d = tile_decay(g, into, i_s, length, i_h, BT, GATE)
    b_z = weighed(b_x, into, out, scale, GATE, REVERSE, DTYPE)
    return step(
        s, b_z, b_b, b, row_b, col_b, width_b, m_r, decay, d, row_d, 0, NS, BK, K, GATE, DESC, MASK, OWN, DTYPE,
        PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "NT", "NC", "SEG", "NSEG"])
def scan_kernel(
    a, b, x, x_rows, scores, g, decay, start, borders, passed, flags, states, o, o_rows, end, cu_seqlens, tile_base,
    chunk_base, segments, own_segments, scale, T, NT, NC, SEG, NSEG,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, TPC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr,
    CUT: tl.constexpr, LOOKS_BACK: tl.constexpr, STORE_STATES: tl.constexpr, STORE_END: tl.constexpr,
    VARLEN: tl.constexpr, OWN: tl.constexpr, TURNS: tl.constexpr, DESC: tl.constexpr, DESC_X: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile by tile o = A x + â S and S ← decay · S + b̂ᵀ x; `states` `[chunks, HB, V, K]` hold S as chunks meet it.

    Forward, a = q, b = k, x = v; â carries scale and the decay from the tile's start, b̂ that to its end. Backward in
    time the roles of â and b̂ are swapped, a = k, b = q, x = do, with Aᵀ: o is dv, and `states` are the gradients of the
    state at each chunk's end. For gates on channels a and b are qg and kg of `prepare_kernel`, `[tiles, HA or HB, BT,
    K]`, and decay `[tiles, H, K]` is that of tiles; of gates a token it is what `kept_row_decay` takes. scores `[tiles,
    HQ, BT, BT]`; start, end `[N, HB, K, V]` and, CUT, borders `[rows, HB, K, V]`, what each segment inside a sequence
    begins with, fp32. Grid: segments · HQ · V/BV · TURNS.

    LOOKS_BACK: segments find out here what they begin with. `borders` `[rows, HB, V, K]` and, unless there is no gate,
    passed `[rows, HB]`, fp32: what each ends with if it begins with zero, and what it lets through, in the order of
    programs; flags `[rows, HB, V/BV]`, which are zero before: whether they are there. Gates without channels, K ≤ BK.

    TURNS programs go over the same tiles, forward, and each gives output and state of every TURNS-th of them: for the
    others it takes one product, the state's, in place of four.

    Each query head of a group goes its own way: forward from the same b and x, so that one of them stores the state;
    backward it makes its own part of dv and of the state's gradient, both `HQ` heads, which are sums over the group.

    OWN: the scores are formed here, of the one slice that a and b have. DESC: a, b and scores are tensor descriptors;
    DESC_X: x and o too, and for the tile in which a sequence ends they are given as x_rows and o_rows. WHOLE: none
    does. Where one may, DESC_X is for forward passes alone: a tile of its own before the others leaves all products of
    the loop waiting for each other.
    """
    HQ: tl.constexpr = H * GROUP
    HB: tl.constexpr = HQ if REVERSE else H
    NV: tl.constexpr = (V + BV - 1) // BV
    NS: tl.constexpr = (K + BK - 1) // BK
    LAST: tl.constexpr = DESC_X and not WHOLE  # whether the tile in which a sequence ends is taken by itself
    # what doesn't change from tile to tile is formed anew where the state leaves no registers to keep it in
    LEAN: tl.constexpr = NS > 1 and GATE != _CHANNEL
    tl.static_assert(TURNS == 1 or not (REVERSE or DESC or GATE == _CHANNEL))
    tl.static_assert(not LOOKS_BACK or not (NS > 1 or TURNS > 1 or CUT or DESC or GATE == _CHANNEL))
    pid = tl.program_id(0)
    turn = 0
    if TURNS > 1:
        turn, pid = pid % TURNS, pid // TURNS
    i_v, i_q, i = pid % NV, (pid // NV) % HQ, pid // (NV * HQ)
    i_b = i_q if REVERSE else i_q // GROUP
    twin = 0 if REVERSE else i_q % GROUP  # of the programs that make the same state, the first stores it
    i_n, begin, stop, row = segment_at(i, segments, SEG, NSEG, NT, VARLEN)
    if VARLEN:  # noqa: SIM102 (known when compiled, which the next isn't)
        if i_n < 0:
            return
    first, length, t_base, n_tiles, c_base = sequence_at(i_n, cu_seqlens, tile_base, chunk_base, T, NT, NC, BT, VARLEN)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    if LOOKS_BACK:
        begin, stop, before = in_order(i, i_n, segments, own_segments, SEG, NSEG, NT, REVERSE, VARLEN)
        o_k = tl.arange(0, BK)
        m_s = m_v[:, None] & (o_k < K)[None, :]
        place = row * HB + i_b
        if begin > 0 if REVERSE else (stop < n_tiles) & (twin == 0):
            ends = slices(0, True, o_v, 0, NS, BK, K, V, False)
            through = 1.0
            for j in tl.range(begin, stop, num_stages=STAGES):
                i_s = begin + stop - 1 - j if REVERSE else j
                ends = tile_step(
                    ends, a, b, x, scores, g, decay, states, o, t_base + i_s, i_s, i_q, i_v, twin, first, length,
                    n_tiles, c_base, scale, H, GROUP, K, V, BT, TPC, BK, BV, GATE, REVERSE, STORE_STATES, OWN, DESC,
                    DESC_X, False, DTYPE, PRECISION,
                )  # fmt: skip
                through *= kept_tile_decay(g, decay, t_base + i_s, i_s, length, i_q // GROUP, H, BT, GATE)
            publish(ends[0], through, borders, passed, flags, place, i_v, o_k, o_v, m_s, K, V, NV, GATE)
    p_start, known = entering(start, borders, i_n, row, begin, stop, n_tiles, i_b, HB, K * V, REVERSE, HAS_START, CUT)
    s = slices(p_start, known, o_v, 0, NS, BK, K, V, HAS_START or CUT)
    if LOOKS_BACK:
        s = (look_back(s[0], borders, passed, flags, place, i_v, before, o_k, o_v, m_s, HB, K, V, NV, GATE),)
    if TURNS > 1:
        for early in range(begin, tl.minimum(begin + turn, stop)):
            s = tile_step(
                s, a, b, x, scores, g, decay, states, o, t_base + early, early, i_q, i_v, twin, first, length,
                n_tiles, c_base, scale, H, GROUP, K, V, BT, TPC, BK, BV, GATE, REVERSE, STORE_STATES, OWN, DESC, DESC_X,
                False, DTYPE, PRECISION,
            )  # fmt: skip
    full = tl.minimum(stop, length // BT) if LAST else stop
    for j in tl.range(begin + turn, full, TURNS, num_stages=STAGES, disable_licm=LEAN):
        i_s = begin + full - 1 - j if REVERSE else j
        s = tile_step(
            s, a, b, x, scores, g, decay, states, o, t_base + i_s, i_s, i_q, i_v, twin, first, length, n_tiles,
            c_base, scale, H, GROUP, K, V, BT, TPC, BK, BV, GATE, REVERSE, STORE_STATES, OWN, DESC, DESC_X, True,
            DTYPE, PRECISION,
        )  # fmt: skip
        for n in tl.static_range(1, TURNS):  # past the end they are rows of zeros
            s = tile_step(
                s, a, b, x, scores, g, decay, states, o, t_base + j + n, j + n, i_q, i_v, twin, first, length,
                n_tiles, c_base, scale, H, GROUP, K, V, BT, TPC, BK, BV, GATE, REVERSE, STORE_STATES, OWN, DESC,
                DESC_X, False, DTYPE, PRECISION,
            )  # fmt: skip
    if LAST:  # noqa: SIM102 (known when compiled, which the next isn't)
        if full < stop:
            s = tile_step(
                s, a, b, x_rows, scores, g, decay, states, o_rows, t_base + full, full, i_q, i_v, twin, first, length,
                n_tiles, c_base, scale, H, GROUP, K, V, BT, TPC, BK, BV, GATE, REVERSE, STORE_STATES, OWN, DESC,
                False, True, DTYPE, PRECISION,
            )  # fmt: skip
    if STORE_END:  # noqa: SIM102 (as above)
        if (twin + turn == 0) & (begin == 0 if REVERSE else stop == n_tiles):
            for n in tl.static_range(NS):
                o_k = n * BK + tl.arange(0, BK)
                p_e = end + (i_n.to(tl.int64) * HB + i_b) * K * V + o_k[None, :] * V + o_v[:, None]
                tl.store(p_e, s[n], mask=m_v[:, None] & (o_k < K)[None, :])
