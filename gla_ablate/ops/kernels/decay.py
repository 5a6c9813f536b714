r"""Gates on channels: decay between the rows of a tile, as products of matrices of 0 and ±1 with the gates.

Every exponent is a sum over the rows between a row and an anchor, so a matrix of zeros and ones (−1 where what writes
comes first) sums it, on the units that have time to spare; and its transpose takes gradients back to the gates. The
matrices are exact in 16 bits, and a gate is in two halves of 16 bits, so that a sum is off by 2^−16 of itself; fp32
takes three products of tf32. In steep tiles gates are floored where exp2 gives 0 in any case: −inf would be
NaN wherever it meets a zero of the matrix. A tile that has −inf is never mild.

The tiles of these kernels are transposed, channels by rows `[BK, BT]`: what is multiplied with a matrix over rows is
then the left operand, which comes from the registers where the last product left it. The other way round it would go
through shared memory and a barrier each time, and these kernels are long chains of products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import LOG2E, across, cut, locate

FLOOR = tl.constexpr(-160.0)
SEEN = tl.constexpr(16)  # channels of `survey_kernel`: 64 bytes of a row


@triton.jit(do_not_specialize=["T", "NT"])
def survey_kernel(
    sums, g, steep, tiles, mild, T, NT,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """What the others need first: sums `[LEVELS + 4, BT, BT]`, and steep `[tiles, H]`, which tiles are seen to be
    steep (see `prepare_kernel`) by their first channels, so that no other kernel reads them in vain.
    Grid: the matrices, and tiles · H.
    """
    MATRICES: tl.constexpr = LEVELS + 4
    i = tl.program_id(0)
    o_i = tl.arange(0, BT)
    if i < MATRICES:
        b = counted(i, BT, BLOCK, LEVELS).to(sums.dtype.element_ty)
        tl.store(sums + i * BT * BT + o_i[:, None] * BT + o_i[None, :], b)
    else:
        i_h, i_t = (i - MATRICES) % H, (i - MATRICES) // H
        i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
        if i_s * BT >= length:
            return
        o_k = tl.arange(0, SEEN)
        m_t, m_k = i_s * BT + o_i < length, o_k < K
        b_g = gates(g, first + i_s * BT, i_h * K, H * K, m_t, m_k, False, True)
        tl.store(steep + i_t.to(tl.int64) * H + i_h, is_steep(*half_sums(b_g), mild))


@triton.jit
def counted(i, BT: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Matrix i `[BT, BT]`: which rows count for each row. 0: those up to it, for the decay from the tile's start; 1:
    those after it, for the decay to the tile's end; then, for w = BLOCK / 2, BLOCK, … BT / 2, and BT / 2 again, those
    between it and the middle of its 2w rows: in the later half up to it, in the earlier after it. In the first and the
    last of these the earlier half counts −1: what reads from the middle takes exp2 of the sum, what writes of −sum."""
    o_i = tl.arange(0, BT)
    earlier = o_i[None, :] <= o_i[:, None]
    if i == 0:
        b = earlier.to(tl.float32)
    elif i == 1:
        b = 1.0 - earlier.to(tl.float32)
    else:
        w = (BLOCK // 2) << tl.minimum(i - 2, LEVELS)
        later = (o_i // w % 2 == 1)[:, None]
        near = o_i[:, None] // w == o_i[None, :] // w
        b = (near & (earlier == later)).to(tl.float32)
        signed = (i == 2) | (i > LEVELS + 2)
        b = tl.where(later, b, tl.where(signed, 0.0 - b, b))
    return b


@triton.jit
def half_sums(b_g):
    """The gates `[BK, BT]` summed over the earlier and over the later half of the rows."""
    later = is_later(b_g.shape[1] // 2, b_g.shape[1])
    return tl.sum(tl.where(later, 0.0, b_g), axis=1), tl.sum(tl.where(later, b_g, 0.0), axis=1)


@triton.jit
def is_steep(early, late, mild):
    """1 if a half of the tile decays by more than `mild` in a channel, or is NaN."""
    is_mild = (tl.abs(early) <= mild) & (tl.abs(late) <= mild)
    return tl.max(is_mild.to(tl.int32) ^ 1, axis=0)


@triton.jit
def some_steep(steep, i_t, i_h, COUNT, H: tl.constexpr, SPAN: tl.constexpr):
    """Whether one of SPAN tiles from `i_t` on is marked steep. Past the end of packed sequences a mark is anything."""
    o_t = i_t + tl.arange(0, SPAN)
    marks = tl.load(steep + o_t.to(tl.int64) * H + i_h, mask=o_t < COUNT, other=0)
    return tl.max((marks != 0).to(tl.int32), axis=0) > 0


@triton.jit
def matrix(sums, i: tl.constexpr, N: tl.constexpr, BT: tl.constexpr):
    """Of `survey_kernel`, for the first N rows alone. From memory: matrix units find it there without a register."""
    o_i = tl.arange(0, N)
    return tl.load(sums + i * BT * BT + o_i[:, None] * BT + o_i[None, :])


@triton.jit
def matrices(sums, i: tl.constexpr, n: tl.constexpr, N: tl.constexpr, BT: tl.constexpr):
    """Matrices i … n − 1."""
    one = (matrix(sums, i, N, BT),)
    if i == n - 1:
        return one
    else:
        return one + matrices(sums, i + 1, n, N, BT)


@triton.jit
def clipped(b, BOUND: tl.constexpr):
    """`parts` of max(b, BOUND), but for what is within 2^−8 of it; BOUND has no lower half."""
    if len(b) == 1:
        return (cut(b[0], BOUND),)
    else:
        below = b[0].to(tl.float32) < BOUND
        return (tl.where(below, BOUND, b[0]).to(b[0].dtype), tl.where(below, 0.0, b[1]).to(b[1].dtype))


@triton.jit
def summed(b, take):
    """`[BK, BT]`: of b, from `parts`, the sum over the rows that `take` `[BT, BT]` marks for each row."""
    if len(b) == 1:
        return tl.dot(b[0], tl.trans(take), input_precision="tf32x3")
    else:
        return tl.dot(b[0], tl.trans(take), tl.dot(b[1], tl.trans(take)))


@triton.jit
def collected(b, take, acc=None):
    """The transpose of `summed`: over the rows for which `take` marks each row; and acc."""
    if len(b) == 1:
        return tl.dot(b[0], take, acc, input_precision="tf32x3")
    else:
        return tl.dot(b[0], take, tl.dot(b[1], take, acc))


@triton.jit
def gates(g, row, col, width, m_t, m_k, DESC: tl.constexpr, WHOLE: tl.constexpr):
    """log2 gates `[BK, BT]`."""
    return across(g, row, col, width, m_t, m_k, DESC, WHOLE) * LOG2E


@triton.jit
def floored(b):
    """The log2 gates, not below FLOOR."""
    return cut(b, FLOOR)


@triton.jit
def about_block(b, take, hard, BOUND: tl.constexpr):
    """Of log2 gates, from `parts`, the sum to the middle of a block; of `hard` ones with steps cut at BOUND."""
    if hard:  # noqa: SIM108 (not known until the kernel runs)
        d = summed(clipped(b, BOUND), take)
    else:
        d = summed(b, take)
    return d


@triton.jit
def about_blocks(a, b, take, hard, BOUND: tl.constexpr):
    """As `about_block`, of two blocks under one condition, across which nothing else could move."""
    if hard:
        c, d = summed(clipped(a, BOUND), take), summed(clipped(b, BOUND), take)
    else:
        c, d = summed(a, take), summed(b, take)
    return c, d


@triton.jit
def through(e):
    """What all rows let through `[BK]`, of what those up to each let through: what the last finds."""
    last = tl.arange(0, e.shape[1])[None, :] == e.shape[1] - 1
    return tl.sum(tl.where(last, e, 0.0), axis=1)


@triton.jit
def is_later(w: tl.constexpr, BT: tl.constexpr):
    """Which rows `[1, BT]` lie in the later w of their 2w."""
    return ((tl.arange(0, BT) // w) % 2 == 1)[None, :]


@triton.jit
def between(w: tl.constexpr, BT: tl.constexpr):
    """The pairs `[BT, BT]` of rows in the two halves of the same 2w rows, either way round."""
    o_i = tl.arange(0, BT)
    return (o_i[:, None] // (2 * w) == o_i[None, :] // (2 * w)) & (o_i[:, None] // w != o_i[None, :] // w)
