"""What `gated_linear_attention` takes, checked before any launch: each error names the argument and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gla_ablate.numeric import is_finite, is_number, is_whole

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 512


def shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def check_tensor(name: str, x: object, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, takes a tensor")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: got dtype {x.dtype}, takes float32, bfloat16, float16 or float64")
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"{name}: got a nested tensor or layout {x.layout}, takes a dense tensor of torch.strided")
    if x.device != q.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, takes one on q's device, {q.device}")


def check_channels(name: str, x: Tensor) -> None:
    if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: got {x.shape[-1]} channels a head, takes 1 to {MAX_HEAD_DIM}")


def check_operands(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, takes: str) -> None:
    """That q, k, v have the dimensions that `takes` spells out, and go together, and g and gv with them."""
    dimensions = takes.count(",") + 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, q)
        if x.dim() != dimensions:
            raise ValueError(f"{name}: got shape {shape(x)}, takes {takes}")
    if not q.shape[-2]:
        raise ValueError(f"q: got shape {shape(q)}, takes at least one head")
    check_channels("q", q)
    if k.shape != q.shape:
        heads, own = q.shape[-2], k.shape[-2]
        if (*k.shape[:-2], k.shape[-1]) != (*q.shape[:-2], q.shape[-1]) or not own or heads % own:
            raise ValueError(f"k: got shape {shape(k)}, takes that of q, {shape(q)}, or fewer heads that divide q's")
    if v.shape[:-1] != k.shape[:-1]:
        rows = ", ".join(map(str, k.shape[:-1]))
        raise ValueError(f"v: got shape {shape(v)}, takes [{rows}, V] to go with k {shape(k)}")
    check_channels("v", v)
    if g is not None:
        check_tensor("g", g, q)
        kinds = ((k.shape[-2],), tuple(k.shape[:-1]), tuple(k.shape))
        if tuple(g.shape) not in kinds:
            takes = ", ".join(str(list(kind)) for kind in kinds)
            raise ValueError(f"g: got shape {shape(g)}, takes one of {takes} (or None) to go with k {shape(k)}")
    if gv is not None:
        check_tensor("gv", gv, q)
        if gv.shape != v.shape:
            raise ValueError(f"gv: got shape {shape(gv)}, takes that of v, {shape(v)} (or None)")


def promoted(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    if q.dtype == k.dtype == v.dtype:
        return q.dtype
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | str,
) -> None:
    """Shapes, dtypes, devices and the chunk size; reads no value of a tensor. Raises `ValueError`."""
    check_operands(q, k, v, g, gv, "four dimensions [B, T, H, channels]")
    B, _, H, K = k.shape
    V = v.shape[-1]
    sequences = B
    if cu_seqlens is not None:
        sequences = check_cu_seqlens(cu_seqlens, q)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, q)
        if tuple(initial_state.shape) != (sequences, H, K, V):
            raise ValueError(f"initial_state: got shape {shape(initial_state)}, takes {[sequences, H, K, V]}")
        if initial_state.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"initial_state: got dtype {initial_state.dtype}, takes float32 (float64 for float64 inputs)"
            )
    known = chunk_size in CHUNK_SIZES if is_whole(chunk_size) else isinstance(chunk_size, str) and chunk_size == "auto"
    if not known:
        raise ValueError(f"chunk_size: got {chunk_size!r}, takes {', '.join(map(str, CHUNK_SIZES))} or 'auto'")


def check_scale(scale: Any) -> None:
    """Raises `ValueError` for all but None and a finite number (while tracing, a number); a tensor would get no
    gradient."""
    if scale is None:
        return
    if torch.compiler.is_compiling():  # a number may be a symbol, with no value to look at
        wrong = isinstance(scale, (Tensor, str, bool))
    else:
        wrong = not (is_number(scale) and is_finite(scale))
    if wrong:
        got = type(scale).__name__ if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(f"scale: got {got}, takes a finite number or None")


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> int:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: got {got}, takes an int32 or int64 tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: got shape {shape(cu_seqlens)}, takes [N + 1] with N ≥ 1 sequences")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: got a tensor on {cu_seqlens.device}, takes one on q's device, {q.device}")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: got a batch of {q.shape[0]}, takes sequences packed into a batch of 1")
    return cu_seqlens.shape[0] - 1


def check_offsets(ends: list[int], T: int) -> None:
    """The values of `cu_seqlens`. Raises `ValueError`."""
    if ends[0] != 0 or ends[-1] != T or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens: got {ends}, takes offsets that rise from 0 to T = {T}")


def check_derivatives(name: str, instead: str, *given: Tensor | None) -> None:
    """That nothing is differentiated but by autograd, backward: kernels know nothing of other derivatives, which would
    come out as zero, or fail inside PyTorch. `name`: of the function, and what does `instead`, for the `RuntimeError`.
    While tracing nothing is looked at."""
    if torch.compiler.is_compiling():
        return
    tensors = [x for x in given if x is not None]
    # PyTorch tells neither in public
    if forward_ad._current_level >= 0 and any(map(has_tangent, tensors)):
        raise RuntimeError(f"{name} has no forward-mode derivative here; {instead} does")
    transformed = torch.is_grad_enabled() and torch._C._are_functorch_transforms_active()
    if transformed and any(map(is_differentiated, tensors)):
        raise RuntimeError(f"{name} has no derivative of torch.func's here; torch.autograd's does, or {instead}")


def layers(x: Tensor) -> Iterator[Tensor]:
    """x as it is seen through each of the transforms of `torch.func` around it, several perhaps, then itself."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        yield x
        x = functorch.get_unwrapped(x)
    yield x


def has_tangent(x: Tensor) -> bool:
    batched = torch._C._functorch.is_batchedtensor  # which has its tangents below
    return any(forward_ad.unpack_dual(y).tangent is not None for y in layers(x) if not batched(y))


def is_differentiated(x: Tensor) -> bool:
    """By a transform of `torch.func`, which is around tensors that it leaves alone, too."""
    return any(torch._C._functorch.is_gradtrackingtensor(y) and y.requires_grad for y in layers(x))


def check_values(q: Tensor, g: Tensor | None, gv: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What costs a read of the data: gates ≤ 0 and not NaN, `cu_seqlens` rising from 0 to T. Raises `ValueError`."""
    for name, gate in (("g", g), ("gv", gv)):
        if gate is not None and (wrong := ~(gate <= 0)).any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"{name}: got {gate[where].item()} at index {list(where)}, takes log decays ≤ 0")
    if cu_seqlens is not None:
        check_offsets(cu_seqlens.tolist(), q.shape[1])
