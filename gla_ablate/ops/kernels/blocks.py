"""What the rows of half a steep tile give each other, backward: in blocks, whose rows meet about the block's centre.

There alone an exponent may be positive, and steps are cut at BOUND; rows of two blocks meet at the border between
them. `masked_blocks` and `two_blocks` take q, k and log2 gates of the rows; x and y as they are at the borders of the
half; `passed`, what passes over all of it; pairs of dA; `take`, the first matrices of `survey_kernel`. They return dq
and dk, but for the pairs of a row with itself, and dg. All are transposed, channels by rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.decay import about_block, about_blocks, collected, gates, is_later, summed, through
from gla_ablate.ops.kernels.parts import apart, parts, product, together, turned


@triton.jit
def inside(b_q, b_k, d, pairs, take, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What pairs inside blocks bring to dq, dk and dg, of the decay d to the centre."""
    zero = tl.zeros(b_q.shape, dtype=tl.float32)
    e, f = tl.exp2(d), tl.exp2(-d)
    b_u = product(parts(b_k * f, DTYPE), pairs, zero, PRECISION) * e
    b_l = product(parts(b_q * e, DTYPE), turned(pairs), zero, PRECISION) * f
    b_z = collected(parts(b_q * b_u - b_k * b_l, DTYPE), take)  # outward from the centre, like the decay
    return b_u, b_l, b_z


@triton.jit
def lighter(b_z, g_rows, row, col, width, m_t, m_k, BOUND: tl.constexpr, WHOLE: tl.constexpr):
    """dg of pairs inside blocks where a step was cut, the pairs across which were too heavy. The gates are loaded anew:
    there are no registers to keep them in."""
    b_g = gates(g_rows, row, col, width, m_t, m_k, False, WHOLE)
    return b_z * tl.exp2(tl.minimum(b_g - BOUND, 0.0))


@triton.jit
def read_and_left(b_q, b_k, b_x, b_y, acc, take, DTYPE: tl.constexpr):
    """Over row t: acc; what is read from it on, of what x brings; what was written before it, of what y takes away."""
    return collected(parts(b_k * b_y, DTYPE), take[1], collected(parts(b_q * b_x, DTYPE), take[0], acc))


@triton.jit
def masked_blocks(
    b_q, b_k, b_x, b_y, b_g, passed, pairs, take, hard, g_rows, row, col, width, m_t, m_k, BLOCK: tl.constexpr,
    BOUND: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block or two (INNER) as one tile. pairs: inside blocks; between them, to be taken from either side."""
    g_parts = parts(b_g, DTYPE)
    zero = tl.zeros(b_q.shape, dtype=tl.float32)
    b_x *= tl.exp2(summed(g_parts, take[0]))
    b_y *= tl.exp2(summed(g_parts, take[1]))
    d = about_block(g_parts, take[2], hard, BOUND)
    b_u, b_l, b_z = inside(b_q, b_k, d, pairs[0], take[2], DTYPE, PRECISION)
    if hard:
        b_z = lighter(b_z, g_rows, row, col, width, m_t, m_k, BOUND, WHOLE)
    b_dg = read_and_left(b_q, b_k, b_x, b_y, passed + b_z, take, DTYPE)
    if INNER > 0:
        # one tile holds both factors, each with the decay to where the blocks meet
        later = is_later(BLOCK, b_g.shape[1])
        b_e, b_f = tl.exp2(summed(g_parts, take[3])), tl.where(later, b_q, b_k)
        b_w = product(parts(b_f * b_e, DTYPE), pairs[1], zero, PRECISION) * b_e
        b_dg = collected(parts(b_f * b_w, DTYPE), take[3], b_dg)
        b_x += tl.where(later, b_w, 0.0)
        b_y += tl.where(later, 0.0, b_w)
    return b_x + b_u, b_y + b_l, b_dg


@triton.jit
def two_blocks(
    b_q, b_k, b_x, b_y, b_g, passed, pairs, take, hard, g_rows, row, col, width, m_1, m_2, m_k, BOUND: tl.constexpr,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Two blocks as a tile each: the later is to the earlier what y is to both, the earlier to the later what x is.
    pairs: inside the earlier, inside the later, between them.

    What cut steps take is done under two conditions, for the compiler moves nothing across one, and before the sums
    that it goes into: if what is stored came from a condition, it would change its layout on its way, cut or not. The
    order of the lines is one that spills no registers."""
    q_1, q_2 = apart(b_q)
    k_1, k_2 = apart(b_k)
    x_1, x_2 = apart(b_x)
    y_1, y_2 = apart(b_y)
    g_1, g_2 = apart(b_g)
    zero = tl.zeros(q_1.shape, dtype=tl.float32)
    p_1, p_2 = parts(g_1, DTYPE), parts(g_2, DTYPE)
    e_1, e_2 = tl.exp2(summed(p_1, take[0])), tl.exp2(summed(p_2, take[0]))
    f_1 = tl.exp2(summed(p_1, take[1]))
    x_1 *= e_1
    x_2 *= e_2 * through(e_1)[:, None]
    f_2 = tl.exp2(summed(p_2, take[1]))
    y_2 *= f_2
    y_1 *= f_1 * through(e_2)[:, None]
    over_1 = passed + tl.sum(q_2 * x_2, axis=1)[:, None]
    over_2 = passed + tl.sum(k_1 * y_1, axis=1)[:, None]
    y_1 += product(parts(q_2 * e_2, DTYPE), turned(pairs[2]), zero, PRECISION) * f_1
    x_2 += product(parts(k_1 * f_1, DTYPE), pairs[2], zero, PRECISION) * e_2
    d_1, d_2 = about_blocks(p_1, p_2, take[2], hard, BOUND)
    u_1, l_1, z_1 = inside(q_1, k_1, d_1, pairs[0], take[2], DTYPE, PRECISION)
    u_2, l_2, z_2 = inside(q_2, k_2, d_2, pairs[1], take[2], DTYPE, PRECISION)
    if hard:
        z_1 = lighter(z_1, g_rows, row, col, width, m_1, m_k, BOUND, WHOLE)
        z_2 = lighter(z_2, g_rows, row + z_1.shape[1], col, width, m_2, m_k, BOUND, WHOLE)
    over_1 = read_and_left(q_1, k_1, x_1, y_1, over_1 + z_1, take, DTYPE)
    over_2 = read_and_left(q_2, k_2, x_2, y_2, over_2 + z_2, take, DTYPE)
    return together(x_1 + u_1, x_2 + u_2), together(y_1 + l_1, y_2 + l_2), together(over_1, over_2)
