"""The way to a compiled kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled: dict[tuple[Any, ...], Any] = {}


def trait(x: Any, parameter: Any) -> Any:
    """What Triton compiles for: the value of a constant, and of other arguments their type and how they are aligned."""
    if parameter.is_constexpr:
        return x
    if x is None or isinstance(x, float):
        return None
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return x >= 2**31, parameter.do_not_specialize or (x == 1, x % 16 == 0)


def launch(kernel: Any, grid: int, key: Any = None, **arguments: Any) -> None:
    """Every launch of the package passes here; tests look on where those of a `Call` come from, `call.launch`.

    `arguments` are the kernel's, in its order, and then options. Triton takes longer to find the compiled kernel anew
    than many a kernel runs, so it is remembered: under `key`, which must tell any two calls apart that Triton would
    compile apart, or under all that it compiles for.
    """
    if grid == 0:
        return
    if not isinstance(kernel, JITFunction):  # the interpreter's, which compiles nothing, and takes any order
        assert [*arguments][: len(kernel.arg_names)] == [*kernel.arg_names], kernel.arg_names
        if arguments.get("DTYPE") == tl.bfloat16:  # which only kernels with matrix products are given
            raise ValueError(
                "backend: got 'triton' with bfloat16 in Triton's interpreter, whose matrix products of it are wrong, "
                "takes it on a GPU; float32 and float16 here, or 'torch'"
            )
        kernel[(grid,)](**arguments)
        return
    values = tuple(arguments.values())
    n = len(kernel.params)
    found = (kernel, key or (torch.cuda.current_device(), values[n:], *map(trait, values, kernel.params)))
    compiled = _compiled.get(found)
    if compiled is None:
        _compiled[found] = kernel[(grid,)](**arguments)
    else:
        compiled[grid, 1, 1](*values[:n])
