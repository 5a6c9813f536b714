"""Matrices as the chip's copy engine takes them: tensor descriptors, made anew at every call, and so made fast."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@lru_cache(maxsize=4096)
def form(n: int, width: int, rows: int, columns: int, size: int) -> dict[str, Any] | None:
    """A tensor descriptor but for its tensor; None where the chip's copy engine can't take the matrix."""
    if n == 0 or width * size % 16 or n // width >= 2**31:
        return None
    return vars(TensorDescriptor(torch.empty(0), [n // width, width], [width, 1], [rows, columns]))


def describe(x: Tensor, width: int, rows: int, columns: int) -> TensorDescriptor | None:
    """x as a matrix of `width` columns that is read in tiles by the chip's copy engine; None where it can't be."""
    known = None if x.data_ptr() % 16 else form(x.numel(), width, rows, columns, x.element_size())
    if known is None:
        return None
    made = object.__new__(TensorDescriptor)  # whose own way to be made checks all that again, for 5 µs
    made.__dict__.update(known, base=x)
    return made
