"""The Triton kernels as operators of PyTorch, so that `torch.compile`, autograd and `opcheck` know them.

`gla_ablate::forward` → (o, final state, scores) and `gla_ablate::backward` → the gradients; tensors that a call doesn't
ask for are empty. A second derivative raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gla_ablate.ops.kernels import driver


def states_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Shape `[N, H, K, V]` of a state."""
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return n, q.shape[2], q.shape[3], v.shape[3]


def nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("gla_ablate::forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, state, scores = driver.forward(q, k, v, g, initial_state, cu_seqlens, scale, chunk, keep_state)
    return o, nothing(q) if state is None else state, scores


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state = q.new_empty(states_of(q, v, cu_seqlens), dtype=torch.float32) if keep_state else nothing(q)
    return torch.empty_like(v), state, q.new_empty((*q.shape[:3], chunk), dtype=driver.NUMERICS[q.dtype].store)


@torch.library.custom_op("gla_ablate::backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor,
    do: Tensor,
    d_state: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, d_start = driver.backward(q, k, v, g, initial_state, cu_seqlens, scores, do, d_state, scale, chunk)
    return dq, dk, dv, nothing(q) if dg is None else dg, nothing(q) if d_start is None else d_start


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor,
    do: Tensor,
    d_state: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = nothing(q) if g is None else torch.empty_like(g)
    d_start = nothing(q) if initial_state is None else torch.empty_like(initial_state)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, d_start


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, do: Tensor | None, d_state: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state, cu_seqlens, scores = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    if d_state is not None and d_state.numel() == 0:
        d_state = None
    d_state = None if d_state is None else d_state.contiguous()
    dq, dk, dv, dg, d_start = backward(
        q, k, v, g, initial_state, cu_seqlens, scores, do.contiguous(), d_state, ctx.scale, ctx.chunk
    )
    return dq, dk, dv, None if g is None else dg, None if initial_state is None else d_start, None, None, None, None


def no_second_derivative(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("gated_linear_attention has no second derivative; backend='torch' does")


forward.register_autograd(gradients, setup_context=save)
backward.register_autograd(no_second_derivative)
