r"""What the kernels share: the kinds of gate, where a tile lies, and the decay over rows and tiles.

Vocabulary. A *chunk* is the user's `chunk_size` C of tokens, at whose borders states are kept. A *tile* is what a
program works on: BT = min(C, 64) rows of a sequence; a chunk has TPC = C / BT of them (fp32 operands: C and BT ≤ 32);
`i_t` counts tiles over all sequences, `i_s` inside one. Decays are log2 sums in fp32, each outward from its anchor
(see `gla_ablate.ops.chunkwise`), so exp2 never sees a difference of running sums. `prefix` of row i: g over the tile's
rows up to and with i; `suffix`: over those after i; `into` and `out`: what these let through.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The kind of gate: a constexpr of every kernel. Only CHANNEL does arithmetic on K channels of decay.
NONE, HEAD, TOKEN, CHANNEL = range(4)

_HEAD = tl.constexpr(HEAD)
_TOKEN = tl.constexpr(TOKEN)
_CHANNEL = tl.constexpr(CHANNEL)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(i_t, tiles, T, NT, VARLEN: tl.constexpr):
    """Of tile `i_t`: its place in its sequence, the sequence's first row (64 bits for offsets) and length."""
    if VARLEN:
        p = tiles + i_t.to(tl.int64) * 4
        i_s, first, length = tl.load(p).to(tl.int32), tl.load(p + 1), tl.load(p + 2).to(tl.int32)
    else:
        i_s = i_t % NT
        first = (i_t // NT).to(tl.int64) * T
        length = T
    return i_s, first, length


@triton.jit
def chunk_of(i_t, i_s, tiles, NT, NC, TPC: tl.constexpr, VARLEN: tl.constexpr):
    """Of tile i_t, in place i_s of its sequence: its chunk among those of all sequences, in 64 bits."""
    return tl.load(tiles + i_t.to(tl.int64) * 4 + 3) if VARLEN else (i_t // NT * NC + i_s // TPC).to(tl.int64)


@triton.jit
def cut(x, bound):
    """max(x, bound) that keeps a NaN: a broken gate must show in the loss, not pass for a reset."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def head_gate(g, i_h):
    """The fixed log2 decay of a head; a floor keeps 0 · (−inf) out of the closed forms below."""
    return cut(tl.load(g + i_h).to(tl.float32) * LOG2E, -1e30)


@triton.jit
def head_row_decay(g, i_s, length, i_h, BT: tl.constexpr):
    """`row_decay` of a head's fixed gate, in closed form."""
    o_i = tl.arange(0, BT)
    b_g = head_gate(g, i_h)
    prefix = b_g * (o_i + 1)
    suffix = b_g * tl.maximum(tl.minimum(length - i_s * BT, BT) - 1 - o_i, 0)
    return tl.exp2(prefix), tl.exp2(suffix)


@triton.jit
def row_decay(g, first, i_s, length, i_h, H: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr):
    """into, out `[BT]` of a tile, for gates without channels."""
    if GATE == _HEAD:
        into, out = head_row_decay(g, i_s, length, i_h, BT)
    else:
        o_i = tl.arange(0, BT)
        o_t = i_s * BT + o_i
        p_g = g + (first + o_t) * H + i_h
        prefix = tl.cumsum(tl.load(p_g, mask=o_t < length, other=0.0) * LOG2E)
        # the rows shifted by one, so that the sum from the end leaves the row itself out without a subtraction
        after = (o_i + 1 < BT) & (o_t + 1 < length)
        suffix = tl.cumsum(tl.load(p_g + H, mask=after, other=0.0) * LOG2E, reverse=True)
        into, out = tl.exp2(prefix), tl.exp2(suffix)
    return into, out


@triton.jit
def keep_row_decay(g, decay, i_t, first, i_s, length, i_h, H: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr):
    """Puts `row_decay` of a tile where `kept_row_decay` finds it."""
    into, out = row_decay(g, first, i_s, length, i_h, H, BT, GATE)
    p = decay + (i_t.to(tl.int64) * H + i_h) * 2 * BT + tl.arange(0, BT)
    tl.store(p, into)
    tl.store(p + BT, out)


@triton.jit
def kept_row_decay(g, decay, i_t, i_s, length, i_h, H: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr):
    """`row_decay`; a token's from decay `[tiles, H, 2, BT]`: to sum it tile by tile is what a scan would wait for. Past
    a sequence's last tile that of the last."""
    if GATE == _TOKEN:
        # there may be no memory, and with a mask for each row a scan has half as many instructions again
        beyond = tl.maximum(i_s - tl.maximum(tl.cdiv(length, BT) - 1, 0), 0)
        p = decay + ((i_t - beyond).to(tl.int64) * H + i_h) * 2 * BT + tl.arange(0, BT)
        into, out = tl.load(p), tl.load(p + BT)
    else:
        into, out = head_row_decay(g, i_s, length, i_h, BT)
    return into, out


@triton.jit
def tile_decay(g, into, i_s, length, i_h, BT: tl.constexpr, GATE: tl.constexpr):
    """What a whole tile lets through, for gates without channels; 1 for others."""
    if GATE == _TOKEN:  # as much as into its last row: past a sequence's end nothing decays
        last = tl.arange(0, BT) == BT - 1
        d = tl.where(i_s * BT < length, tl.sum(tl.where(last, into, 0.0)), 1.0)
    elif GATE == _HEAD:
        d = tl.exp2(head_gate(g, i_h) * tl.maximum(tl.minimum(length - i_s * BT, BT), 0))
    else:
        d = 1.0
    return d


@triton.jit
def kept_tile_decay(g, decay, i_t, i_s, length, i_h, H: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr):
    """`tile_decay`; a token's from where `kept_row_decay` finds it."""
    if GATE == _TOKEN:
        last = decay + (i_t.to(tl.int64) * H + i_h) * 2 * BT + BT - 1
        d = tl.load(last, mask=i_s * BT < length, other=1.0)
    else:
        d = tile_decay(g, 1.0, i_s, length, i_h, BT, GATE)
    return d


@triton.jit
def head_matrix(g, first, i_s, length, i_h, H: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr, TRANS: tl.constexpr):
    """log2 decay `[BT, BT]` from row j to row i ≥ j of a tile, gates without channels; 0 for j > i. TRANS: `[j, i]`."""
    o_i = tl.arange(0, BT)
    earlier = o_i[:, None] < o_i[None, :] if TRANS else o_i[:, None] > o_i[None, :]
    if GATE == _HEAD:
        distance = o_i[None, :] - o_i[:, None] if TRANS else o_i[:, None] - o_i[None, :]
        e = tl.where(earlier, head_gate(g, i_h) * distance, 0.0)
    else:
        o_t = i_s * BT + o_i
        b_g = tl.load(g + (first + o_t) * H + i_h, mask=o_t < length, other=0.0) * LOG2E
        if TRANS:
            e = tl.cumsum(tl.where(earlier, b_g[None, :], 0.0), axis=1)
        else:
            e = tl.cumsum(tl.where(earlier, b_g[:, None], 0.0), axis=0)
    return e


@triton.jit
def block(p, row, col, width, m_r, m_c, DESC: tl.constexpr):
    """The tile at (row, col) of a matrix with `width` columns; `DESC`: p is a tensor descriptor, which knows its tile
    and lets rows in that the masks would not."""
    if DESC:
        b = p.load([row.to(tl.int32), col])
    else:
        o_r, o_c = tl.arange(0, m_r.shape[0]), tl.arange(0, m_c.shape[0])
        p_b = p + (row.to(tl.int64) * width + col) + (o_r[:, None] * width + o_c[None, :])
        b = tl.load(p_b, mask=m_r[:, None] & m_c[None, :], other=0.0)
    return b


@triton.jit
def ended(b, m_t, DESC: tl.constexpr, WHOLE: tl.constexpr):
    """A transposed `block`, zero in rows past the sequence's end."""
    if DESC and not WHOLE:
        b = tl.where(m_t[None, :], b, 0.0).to(b.dtype)
    return b


@triton.jit
def across(p, row, col, width, m_t, m_k, DESC: tl.constexpr, WHOLE: tl.constexpr):
    """`[BK, BT]` of a matrix whose rows are those of the tile."""
    return ended(tl.trans(block(p, row, col, width, m_t, m_k, DESC)), m_t, DESC, WHOLE)


@triton.jit
def beside(p, row, col, width, m_k, m_t, DESC: tl.constexpr, WHOLE: tl.constexpr):
    """`[BK, BT]` of a matrix that is transposed already."""
    return ended(block(p, row, col, width, m_k, m_t, DESC), m_t, DESC, WHOLE)


@triton.jit
def store(p, b, row, col, width, m_r, m_c, DESC: tl.constexpr):
    """Puts b, in p's dtype, where `block` finds it. DESC: all of its rows and columns are there."""
    if DESC:
        p.store([row.to(tl.int32), col], b.to(p.dtype))
    else:
        o_r, o_c = tl.arange(0, m_r.shape[0]), tl.arange(0, m_c.shape[0])
        p_b = p + (row.to(tl.int64) * width + col) + (o_r[:, None] * width + o_c[None, :])
        tl.store(p_b, b.to(p.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])
