r"""Gates on channels: decay between the rows of a tile, as products of 0/1 matrices with the gates.

Every exponent is a sum over the rows between a row and an anchor, so a matrix of zeros and ones sums it, on the units
that have time to spare; and its transpose takes gradients back to the gates. The matrices are exact in 16 bits, and a
gate is in two halves of 16 bits, so that a sum is off by 2^−16 of itself; fp32 takes three products of tf32. Steps are
floored where exp2 gives 0 in any case: −inf would be NaN wherever it meets a zero of the matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import LOG2E, cut

FLOOR = tl.constexpr(-160.0)


@triton.jit
def sums_kernel(sums, BT: tl.constexpr, BLOCK: tl.constexpr):
    """`[3 + levels + 1, BT, BT]`: which rows count for each row. First those up to it, for the decay from the tile's
    start; then those after it, for the decay to the tile's end; then, for halves of w = BT / 2 and of w = BLOCK / 2,
    BLOCK, 2 · BLOCK, … rows, those between it and the middle of its 2w rows: in the later half up to it, in the earlier
    after it, and there with −1 in the first of these, which sums outward from the middle. Grid: the matrices.
    """
    i = tl.program_id(0)
    o_i = tl.arange(0, BT)
    earlier = o_i[None, :] <= o_i[:, None]
    if i == 0:
        b = earlier.to(tl.float32)
    elif i == 1:
        b = 1.0 - earlier.to(tl.float32)
    else:
        w = BT // 2
        if i > 2:
            w = (BLOCK // 2) << (i - 3)
        later = (o_i // w % 2 == 1)[:, None]
        near = o_i[:, None] // w == o_i[None, :] // w
        b = (near & (earlier == later)).to(tl.float32)
        if i == 2:
            b = tl.where(later, b, -b)
    tl.store(sums + i * BT * BT + o_i[:, None] * BT + o_i[None, :], b.to(sums.dtype.element_ty))


@triton.jit
def parts(b, DTYPE: tl.constexpr):
    """fp32 as a tuple of DTYPE that add up to it."""
    if DTYPE == tl.float32:  # noqa: SIM300 (DTYPE is the variable)
        return (b,)
    else:
        high = (b.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        return (high.to(DTYPE), (b - high).to(DTYPE))


@triton.jit
def rounded(b, DTYPE: tl.constexpr):
    """fp32 with the value that it has in DTYPE, but for ties and for NaN, which may be lost: what a conversion there
    and back gives, in a quarter of the time."""
    if DTYPE == tl.float32:  # noqa: SIM300 (the same)
        return b
    else:
        return ((b.to(tl.int32, bitcast=True) + 32768) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def summed(take, b):
    """Sums `[BT, BK]` over the rows that each row of `take` `[BT, BT]` marks, from `parts`."""
    if len(b) == 1:
        return tl.dot(take, b[0], input_precision="tf32x3")
    else:
        return tl.dot(take, b[0], tl.dot(take, b[1]))


@triton.jit
def inputs(q, k, g, first, o_t, length, i_h, o_k, scale, H: tl.constexpr, K: tl.constexpr):
    """Of rows o_t and channels o_k of a sequence: where they lie in `[B, T, H, K]`, which of them there are, log2
    gates, scale · q and k `[BT, BK]` in fp32."""
    p = ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :]
    m = (o_t < length)[:, None] & (o_k < K)[None, :]
    b_g = cut(tl.load(g + p, mask=m, other=0.0) * LOG2E, FLOOR)
    b_q = tl.load(q + p, mask=m, other=0.0).to(tl.float32) * scale
    b_k = tl.load(k + p, mask=m, other=0.0).to(tl.float32)
    return p, m, b_g, b_q, b_k


@triton.jit
def is_later(w: tl.constexpr, BT: tl.constexpr):
    """Which rows `[BT, 1]` lie in the later w of their 2w."""
    return ((tl.arange(0, BT) // w) % 2 == 1)[:, None]


@triton.jit
def between(w: tl.constexpr, BT: tl.constexpr):
    """The pairs `[BT, BT]` of rows in the two halves of the same 2w rows, either way round."""
    o_i = tl.arange(0, BT)
    return (o_i[:, None] // (2 * w) == o_i[None, :] // (2 * w)) & (o_i[:, None] // w != o_i[None, :] // w)


@triton.jit
def matrices(take, i: tl.constexpr, n: tl.constexpr, BT: tl.constexpr):
    """Matrices i … n − 1 of `sums_kernel`. From memory, where the units that multiply find them without a register."""
    o_i = tl.arange(0, BT)
    one = (tl.load(take + i * BT * BT + o_i[:, None] * BT + o_i[None, :]),)
    if i == n - 1:
        return one
    else:
        return one + matrices(take, i + 1, n, BT)


@triton.jit
def centred(take, b_g, bound, w: tl.constexpr, DTYPE: tl.constexpr):
    """exp(d), exp(−d) `[BT, BK]` about the middle of every 2w rows, from steps cut at `bound` (log2)."""
    d = summed(take, parts(cut(b_g, bound), DTYPE))
    d = tl.where(is_later(w, b_g.shape[0]), d, -d)
    return tl.exp2(d), tl.exp2(-d)
