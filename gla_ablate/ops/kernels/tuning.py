"""Launch parameters: the tiles, warps and stages of each kernel, by dtype and size. Nothing is tuned at run time.

The figures are for Hopper (`benchmarks/tune.py` finds them anew, but for states, segments and survey) and serve other
chips as a safe choice. On a GPU, tests/ops/test_correctness.py compares them with fp64; NOTES.md says which of them it
has run on.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Tuning(NamedTuple):
    """The largest tiles of K and V, warps, stages of pipelined loops."""

    bk: int = 64
    bv: int = 64
    num_warps: int = 4
    num_stages: int = 2


# kernels whose tiles have channels for rows
TRANSPOSED = (
    *("prepare_kernel", "steep_prepare_kernel"),
    *("gradient_kernel", "narrow_gradient_kernel", "channel_gradient_kernel", "steep_gradient_kernel"),
)
STEEP = "steep_prepare_kernel", "steep_gradient_kernel"


def tile(size: int, most: int, least: int = 16) -> int:
    """The tile for a dimension: a power of two from `least` (matrix units take no less than 16) to `most`."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def pieces(size: int, piece: int) -> int:
    return -(-size // piece)


@cache
def tuning(
    kernel: str,
    dtype: torch.dtype,
    K: int,
    V: int,
    chunk: int,
    packed: bool = False,
    wide: bool = False,
    forms_dv: bool = False,
    looks_back: bool = False,
) -> Tuning:
    """Launch parameters of a kernel for inputs of `dtype`, with the tiles that K and V ask for. packed: sequences;
    wide: scans of few programs, see `Call.wide`, and so for `forms_dv` and `looks_back`."""
    most = largest(kernel, dtype, K, chunk, packed, wide, forms_dv, looks_back)
    if K % 16 or V % 16:
        most = most._replace(num_stages=1)  # some Tritons prefetch wrongly where rows don't start at 16 bytes
    if kernel == "products_kernel" and chunk > 64 and most.bv >= V:
        most = most._replace(num_stages=1)  # Triton 3.6 can't compile this loop staged where it is known to run once
    if dtype == torch.bfloat16 and K <= 32 and kernel not in TRANSPOSED:
        # at one slice of 32 channels or fewer the matrix units of whole warp groups give wrong results with Triton 3.6
        # (X of products, at 16 channels states), or fault; those of single warps, which 2 warps leave, are right
        most = most._replace(num_warps=4 if kernel == "products_kernel" else 2, num_stages=1)
    if kernel == "crossing_kernel" and min(K, V) <= 32:
        most = most._replace(num_warps=2, num_stages=1)  # for the same reason, whichever axis has the rows
    # channels are the rows of the transposed tiles: whole warp groups take 64, of which single warps take 16 each
    rows = 16 * most.num_warps if most.num_warps < 4 else 64
    least = rows if dtype == torch.bfloat16 and kernel in TRANSPOSED else 16
    # where it forms dv, of gates a head or a token, tiles of 32 columns are wrong with Triton 3.6
    columns = least if kernel == "narrow_gradient_kernel" else 16
    return most._replace(bk=tile(K, most.bk, least), bv=tile(V, most.bv, columns))


def largest(
    kernel: str, dtype: torch.dtype, K: int, chunk: int, packed: bool, wide: bool, forms_dv: bool, looks_back: bool
) -> Tuning:
    """Launch parameters with the largest tiles that are used at all."""
    narrow = dtype == torch.bfloat16
    if kernel == "scan_kernel":
        if not narrow:
            return Tuning(128, 16, 4, 1)
        if K <= 128:
            return Tuning(128, 128, 8, 3) if wide else Tuning(128, 64, 4, 3)
        return Tuning(128, 128, 8, 2) if K <= 256 else Tuning(128, 64, 8, 1)
    if kernel == "states_kernel":
        if not narrow:
            return Tuning(128, 16, 4, 1)
        if looks_back:  # segments fill the chip, and wait for loads and each other: the fewer programs, the better
            return Tuning(64, 64, 4, 3)
        if forms_dv:  # few programs, and nothing but this goes back in time: two for a head
            return Tuning(32, 64, 4, 5)
        if packed:  # few programs, of the sequences that are cut: each waits for its loads
            return Tuning(128, 64, 4, 4 if K > 64 else 5)
        return Tuning(128, 64, 4, 3) if K <= 128 else Tuning(128, 128, 8, 3)
    if kernel == "segments_kernel":
        return Tuning(32, 64, 4, 3)
    if kernel == "survey_kernel":
        return Tuning(num_warps=1)
    if kernel == "products_kernel":
        if not narrow:
            return Tuning(32, 32, 4, 1)
        if chunk <= 64:
            return Tuning(128, 64, 8, 2)
        # 64 × 32 at 4 warps is faster, and wrong now and then
        return Tuning(128, 32, 8, 5) if chunk == 128 else Tuning(32, 64, 8, 2)
    if kernel == "narrow_gradient_kernel":
        return Tuning(64, 64, 4, 2) if narrow else Tuning(64, 32, 4, 1)
    if kernel in STEEP and narrow:
        # long chains of small products: warp groups would wait for each of them, single warps go on
        return Tuning(16, 64, 1, 3) if kernel == "steep_prepare_kernel" else Tuning(32, 64, 2, 2)
    if kernel in TRANSPOSED:
        return Tuning(64, 64, 4, 3 if kernel == "prepare_kernel" else 2) if narrow else Tuning(32, 64, 4, 1)
    return Tuning(64, 64, 4, 2) if narrow else Tuning(32, 32, 4, 2)  # scores_kernel
