"""The public op: checks its arguments, settles dtypes and hands over to the Triton kernels or to plain PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gla_ablate.ops.checks import (
    check_arguments,
    check_derivatives,
    check_offsets,
    check_scale,
    check_values,
    promoted,
)
from gla_ablate.ops.chunkwise import chunkwise

BACKENDS = ("auto", "triton", "torch")


def resolve_backend(backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """`"triton"` or `"torch"` for a device; "auto" is Triton on CUDA, and torch for float64. Raises `ValueError`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, takes {', '.join(BACKENDS)}")
    kind = torch.device(device).type
    if backend == "auto":
        return "triton" if kind == "cuda" and dtype != torch.float64 else "torch"
    if backend == "triton" and dtype == torch.float64:
        raise ValueError("backend: got 'triton' with float64 inputs, takes 'torch' for them")
    if backend == "triton" and kind != "cuda" and not interpreted():
        raise ValueError(
            f"backend: got 'triton' with tensors on {kind}, takes them on cuda (or on cpu under TRITON_INTERPRET=1)"
        )
    return backend


def auto_chunk(backend: str, K: int) -> int:
    """The fastest chunk size (benchmarks/NOTES.md): narrow states cost less to keep than to form anew."""
    return 128 if backend == "triton" and K > 64 else 64


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which is settled when they are first imported."""
    try:
        from gla_ablate.ops.kernels.scan import scan_kernel
    except ImportError as error:
        raise ValueError(f"backend: got 'triton', which this machine can't import ({error}); takes 'torch'") from error
    return type(scan_kernel).__name__ == "InterpretedFunction"


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | str = "auto",
    backend: str = "auto",
    check_inputs: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Gated linear attention: `S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t`, `o_t = scale · q_t S_t`; with a gate on
    values `S_t = (exp(g_t)ᵀ exp(gv_t)) ∘ S_{t-1} + k_tᵀ v_t`.

    Args:
        q: `[B, T, G·H, K]`, k: `[B, T, H, K]`, v: `[B, T, H, V]`; K and V from 1 to 512, any T ≥ 0. Each head of k, v,
            g and the state serves G ≥ 1 heads of q, one after the other (grouped heads). The kernels repeat none of
            them; the gradients of k, v and g are sums of G parts, those of 16-bit k and v of parts in 16 bits.
            float32, bfloat16, float16, or float64 (torch backend). Under autocast they are cast as a matrix product's
            operands would be; else mixed dtypes are promoted. The products of 16-bit inputs accumulate in fp32.
        g: log forget gate ≤ 0, computed with in fp32 (fp64 for fp64 inputs): None, `[H]` (one fixed decay a head),
            `[B, T, H]` (a head and token) or `[B, T, H, K]` (a channel). −inf is allowed. A gate above 0 or NaN is the
            caller's error, found with `check_inputs`.
        gv: log forget gate ≤ 0 on the channels of v, `[B, T, H, V]`, like g in all else, or None. With it the Triton
            kernels take chunks of 64 at most (32 for fp32 and fp16) and form all but the inputs anew for the backward.
        scale: of q; `K ** -0.5` unless given.
        initial_state: `[N, H, K, V]` fp32 (fp64 for fp64 inputs), N = B, or the number of packed sequences.
        output_final_state: return the state after the last token, in the same shape and dtype.
        cu_seqlens: `[N + 1]` int32 or int64, offsets of N sequences packed into B = 1, which rise from 0 to T;
            sequences may be empty. Others are the caller's error: the kernels on a GPU would read and write past the
            tensors, so there only `check_inputs` finds them. The torch backend reads them, so it can't be traced with
            them.
        chunk_size: 16, 32, 64, 128, 256 or "auto", the fastest. Changes speed and memory, never the result beyond
            rounding. The kernels keep a state a chunk for the backward, for fp32 and fp16 inputs one every 32 tokens or
            less.
        backend: "triton" (CUDA; CPU tensors under `TRITON_INTERPRET=1`), "torch" (plain PyTorch, any device), "auto".
        check_inputs: also read the values of g, gv and cu_seqlens, which on a GPU waits for them.
        recompute: keep nothing but the inputs for the backward, which forms scores and states anew (Triton): less
            memory, more time.

    Returns:
        o `[B, T, G·H, V]` in the dtype of the (promoted) inputs, and the final state or None.

    Raises:
        ValueError: naming the argument, what it got and what it takes. With the Triton backend RuntimeError on a second
            derivative, a forward-mode one and `torch.func`'s, all of which the torch backend has. (Under
            `torch.compile` forward-mode ones aren't found, and are zero.)

    Precision: any g ≤ 0 gives finite results and gradients. Inside a diagonal block of 16 rows (8 for fp32) a step that
    decays by more than exp(−9) (fp32: exp(−18)) may count as that much; across blocks decay is exact.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635), section 4.
    """
    check_arguments(q, k, v, g, gv, initial_state, cu_seqlens, chunk_size)
    check_scale(scale)
    if check_inputs:
        check_values(q, g, gv, cu_seqlens)
    device = q.device.type
    dtype = promoted(q, k, v)
    if autocasts(device, dtype):
        dtype = torch.get_autocast_dtype(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kind = resolve_backend(backend, q.device, dtype)
    chunk = auto_chunk(kind, q.shape[-1]) if isinstance(chunk_size, str) else chunk_size
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    g, gv = (None if x is None else x.to(wide) for x in (g, gv))
    start = None if initial_state is None else initial_state.to(wide)
    if kind == "torch":
        with without_autocast(device):
            o, end = packed_chunkwise(q.to(wide) * scale, k.to(wide), v.to(wide), g, gv, start, cu_seqlens, chunk)
        return o.to(dtype), end if output_final_state else None
    check_derivatives("gated_linear_attention", "backend='torch'", q, k, v, g, gv, start)
    from gla_ablate.ops import library  # Triton takes a while to import, and some machines have none

    q, k, v = (x.to(dtype).resolve_neg().contiguous() for x in (q, k, v))
    g, gv, start = (None if x is None else x.resolve_neg().contiguous() for x in (g, gv, start))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    if gv is not None:
        o, end = library.valued_forward(q, k, v, g, gv, start, cu_seqlens, scale, chunk, output_final_state)
        return o, end if output_final_state else None
    o, end = library.attend(q, k, v, g, start, cu_seqlens, scale, chunk, output_final_state, recompute)
    return o, end if output_final_state else None


def autocasts(device: str, dtype: torch.dtype) -> bool:
    """Whether autocast is on there, and for `dtype`. Meta tensors have none; PyTorch 2.11 can say so, but not compile
    the question."""
    return dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def packed_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, start: Tensor | None,
    cu_seqlens: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`chunkwise`, sequence by sequence where they are packed."""
    H, K, V = *k.shape[2:], v.shape[-1]
    if cu_seqlens is None:
        return chunkwise(q, k, v, g, gv, q.new_zeros(q.shape[0], H, K, V) if start is None else start, chunk)
    ends = cu_seqlens.tolist()
    check_offsets(ends, q.shape[1])
    start = q.new_zeros(len(ends) - 1, H, K, V) if start is None else start
    parts = []
    for i, (a, b) in enumerate(pairwise(ends)):
        gate = g if g is None or g.dim() == 1 else g[:, a:b]
        side = None if gv is None else gv[:, a:b]
        parts.append(chunkwise(q[:, a:b], k[:, a:b], v[:, a:b], gate, side, start[i : i + 1], chunk))
    return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])
