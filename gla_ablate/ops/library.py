"""The Triton kernels as operators of PyTorch, which `torch.compile` and `opcheck` know, and a short way past them.

`gla_ablate::forward` → o, the final state and what is kept for the backward; `gla_ablate::backward` → the gradients;
`gla_ablate::valued_forward` and `…_backward` the same with a gate on values, which keeps nothing but its inputs.
Tensors that a call doesn't ask for are empty. A second derivative raises. Where nothing traces the call, `attend` goes
without the operators: they take a third of the host's time, which at small sizes is what a layer costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gla_ablate.ops.kernels import driver, valued
from gla_ablate.ops.kernels.call import Call
from gla_ablate.ops.kernels.saved import Saved, room

Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward_kernels(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, chunk: int, keep_state: bool, save: bool,
) -> Kept:  # fmt: skip
    o, state, saved = driver.forward(q, k, v, g, initial_state, cu_seqlens, scale, chunk, keep_state, save)
    return outputs(q, o, state, saved if save else None)


def forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, chunk: int, keep_state: bool, save: bool,
) -> Kept:  # fmt: skip
    call = Call(q, k, v, g, cu_seqlens, scale, chunk)
    H, V = v.shape[2:]
    saved = room(call)._replace(states=call.new_states(H)) if save else None
    return outputs(q, v.new_empty(*q.shape[:3], V), call.new_end(H) if keep_state else None, saved)


def outputs(q: Tensor, o: Tensor, state: Tensor | None, saved: Saved | None) -> Kept:
    kept: list[Tensor | None] = [None] * len(Saved._fields) if saved is None else list(saved)
    if saved is not None and saved.read is q:
        kept[2:4] = None, None  # read and write are q and k, which an operator mustn't return
    # an operator's schema has a fixed number of tensors, which mypy can't count here
    return o, *(nothing(q) if x is None else x for x in (state, *kept))  # type: ignore[return-value]


def backward_kernels(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scores: Tensor, states: Tensor, read: Tensor, write: Tensor, decay: Tensor, halves: Tensor, steep: Tensor,
    sums: Tensor, packing: Tensor, do: Tensor, d_state: Tensor | None, scale: float, chunk: int, learned: bool,
) -> Given:  # fmt: skip
    saved = None
    if states.dim() == 4:
        saved = Saved(scores, states, read, write, decay, halves, steep, sums, packing)
        if cu_seqlens is None:
            saved = saved._replace(packing=None)
        if read.dim() == 1:
            saved = saved._replace(read=q, write=k, halves=None, steep=None, sums=None)
        if decay.dim() == 1:
            saved = saved._replace(decay=None)
    dq, dk, dv, dg, d_start = driver.backward(
        q, k, v, g, initial_state, cu_seqlens, saved, do, d_state, scale, chunk, learned
    )
    return dq, dk, dv, nothing(q) if dg is None else dg, nothing(q) if d_start is None else d_start


def backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scores: Tensor, states: Tensor, read: Tensor, write: Tensor, decay: Tensor, halves: Tensor, steep: Tensor,
    sums: Tensor, packing: Tensor, do: Tensor, d_state: Tensor | None, scale: float, chunk: int, learned: bool,
) -> Given:  # fmt: skip
    dg = torch.empty_like(g) if g is not None and (learned or g.dim() == 4) else nothing(q)
    d_start = nothing(q) if initial_state is None else torch.empty_like(initial_state)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, d_start


def nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    """o and the final state; takes what `gla_ablate::forward` takes, but whether to recompute for whether to save."""
    *given, recompute = arguments
    tensors = [x for x in given if isinstance(x, Tensor)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    inputs = (*given, learns and not recompute)
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()
    if traced or any(type(x) not in (Tensor, Parameter) for x in tensors):
        o, state, *_ = forward(*inputs)
        return o, state
    if learns:
        return Attention.apply(*inputs)
    o, state, *_ = forward_kernels(*inputs)
    return o, state


class Attention(torch.autograd.Function):
    """What autograd does with the operators, without them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = forward_kernels(*inputs)
        save(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        # traced, or with create_graph, by way of the operator, which says that there is no second derivative; and where
        # several gradients come in at once, which it takes one after the other
        traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
        if not traced:
            traced = any(x is not None and is_batched(x) for x in incoming)
        return gradients(ctx, *incoming, kernels=backward if traced else backward_kernels)


def is_batched(x: Tensor) -> bool:
    """By a vmap: autograd's own (`is_grads_batched`) or that of `torch.func`."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.chunk, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, do: Tensor | None, d_state: Tensor | None, *_: Tensor | None, kernels: Callable[..., Given] | None = None
) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    do, d_state = incoming(q, v, do, d_state)
    learned = ctx.needs_input_grad[3]
    dq, dk, dv, dg, d_start = (kernels or backward)(
        q, k, v, g, initial_state, cu_seqlens, *kept, do, d_state, ctx.scale, ctx.chunk, learned
    )
    dg, d_start = None if g is None or not learned else dg, None if initial_state is None else d_start
    return dq, dk, dv, dg, d_start, None, None, None, None, None


def incoming(q: Tensor, v: Tensor, do: Tensor | None, d_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of o and of the final state, as the kernels take them."""
    do = v.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do.resolve_neg().contiguous()
    return do, None if d_state is None or d_state.numel() == 0 else d_state.resolve_neg().contiguous()


def no_second_derivative(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("gated_linear_attention has no second derivative; backend='torch' does")


def register(name: str, kernels: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    torch.library.define(
        f"gla_ablate::{name}",
        torch.library.infer_schema(kernels, mutates_args=()),
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.impl(f"gla_ablate::{name}", "default", kernels)
    torch.library.register_fake(f"gla_ablate::{name}", shapes)
    return getattr(torch.ops.gla_ablate, name).default


def valued_forward_kernels(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, chunk: int, keep_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, state = valued.forward(q, k, v, g, gv, initial_state, cu_seqlens, scale, chunk, keep_state)
    return o, nothing(q) if state is None else state


def valued_forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, chunk: int, keep_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state = Call(q, k, v, g, cu_seqlens, scale, chunk).new_end(v.shape[2]) if keep_state else nothing(q)
    return v.new_empty(*q.shape[:3], v.shape[3]), state


def valued_backward_kernels(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, do: Tensor, d_state: Tensor | None, scale: float, chunk: int, learned: bool,
) -> Gradients:  # fmt: skip
    found = valued.backward(q, k, v, g, gv, initial_state, cu_seqlens, do, d_state, scale, chunk, learned)
    # an operator's schema has a fixed number of tensors, which mypy can't count here
    return tuple(nothing(q) if x is None else x for x in found)  # type: ignore[return-value]


def valued_backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, do: Tensor, d_state: Tensor | None, scale: float, chunk: int, learned: bool,
) -> Gradients:  # fmt: skip
    dg = torch.empty_like(g) if g is not None and (learned or g.dim() == 4) else nothing(q)
    d_start = nothing(q) if initial_state is None else torch.empty_like(initial_state)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, torch.empty_like(gv), d_start


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def valued_gradients(ctx: Any, do: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, gv, initial_state, cu_seqlens = ctx.saved_tensors
    do, d_state = incoming(q, v, do, d_state)
    learned = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dgv, d_start = valued_backward(
        q, k, v, g, gv, initial_state, cu_seqlens, do, d_state, ctx.scale, ctx.chunk, learned
    )
    dg, d_start = None if g is None or not learned else dg, None if initial_state is None else d_start
    return dq, dk, dv, dg, dgv, d_start, None, None, None, None


forward = register("forward", forward_kernels, forward_shapes)
backward = register("backward", backward_kernels, backward_shapes)
torch.library.register_autograd("gla_ablate::forward", gradients, setup_context=save)
torch.library.register_autograd("gla_ablate::backward", no_second_derivative)

valued_forward = register("valued_forward", valued_forward_kernels, valued_forward_shapes)
valued_backward = register("valued_backward", valued_backward_kernels, valued_backward_shapes)
torch.library.register_autograd("gla_ablate::valued_forward", valued_gradients, setup_context=save_inputs)
torch.library.register_autograd("gla_ablate::valued_backward", no_second_derivative)
