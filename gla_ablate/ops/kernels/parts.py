"""Numbers of 24 bits as two of 16: what the matrix units take at full speed, with what one of them would lose."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def parts(b, DTYPE: tl.constexpr):
    """fp32 as a tuple of DTYPE that add up to it, to 2^−16 if they are two."""
    if DTYPE == tl.float32:  # noqa: SIM300 (DTYPE is the variable)
        return (b,)
    else:
        high = (b.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        return (high.to(DTYPE), (b - high).to(DTYPE))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, both from `parts`; the product of two lower halves counts for nothing."""
    if len(a) == 2:
        acc = tl.dot(a[1], b[0], acc, input_precision=PRECISION)
    if len(b) == 2:
        acc = tl.dot(a[0], b[1], acc, input_precision=PRECISION)
    return tl.dot(a[0], b[0], acc, input_precision=PRECISION)


@triton.jit
def turned(b):
    """The transposes."""
    if len(b) == 1:
        return (tl.trans(b[0]),)
    else:
        return (tl.trans(b[0]), tl.trans(b[1]))


@triton.jit
def apart(b):
    """The earlier and the later half of the rows of b `[BK, 2 N]`, which mostly stay in their registers."""
    return tl.split(tl.permute(tl.reshape(b, [b.shape[0], 2, b.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def together(a, b):
    """What `apart` took apart."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])
