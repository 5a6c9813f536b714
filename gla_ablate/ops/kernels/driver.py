"""Runs the kernels: `forward` and `backward` on contiguous tensors that `gla_ablate.ops.op` has checked.

Forward:  prepare (gates on channels) or scores → scan.   Backward: scan reversed → products → gradient. Where a scan
would leave most of the chip idle: states of segments from zero → segments → scan of segments. Gates without channels
at narrow heads, where chunks are tiles: products and gradient are one kernel, segments look back at each other, and
most scans form the scores; where scans would have few programs, the gradient kernel forms dv, too, and states alone go
back in time.
No buffer has K channels of decay for a gate without. What `forward` kept, `backward` takes; what it didn't, it forms
anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gla_ablate.ops.kernels.call import Call
from gla_ablate.ops.kernels.common import CHANNEL, HEAD, NONE, TOKEN
from gla_ablate.ops.kernels.decay import survey_kernel
from gla_ablate.ops.kernels.descriptors import describe
from gla_ablate.ops.kernels.gradient import gradient_kernel
from gla_ablate.ops.kernels.gradient_channel import channel_gradient_kernel
from gla_ablate.ops.kernels.gradient_narrow import narrow_gradient_kernel
from gla_ablate.ops.kernels.gradient_steep import steep_gradient_kernel
from gla_ablate.ops.kernels.passes import scan, states
from gla_ablate.ops.kernels.prepare import prepare_kernel
from gla_ablate.ops.kernels.prepare_steep import steep_prepare_kernel
from gla_ablate.ops.kernels.products import products_kernel
from gla_ablate.ops.kernels.saved import Saved, room
from gla_ablate.ops.kernels.scores import scores_kernel
from gla_ablate.ops.kernels.tuning import pieces

AT_MOST = 168  # registers a thread, of three programs of four warps that share a multiprocessor


def prepare(call: Call) -> Saved:
    """All of `Saved` but the states."""
    saved = room(call)
    if call.kind != CHANNEL:
        if not call.own_scores:
            call.run(scores_kernel, call.tiles, scores=saved.scores, decay=saved.decay)
        return saved
    assert call.g is not None
    call.launch(survey_kernel, call.matrices + call.tiles * call.shape[2], sums=saved.sums, steep=saved.steep)
    kept: dict[str, Any] = {"decay": saved.decay, "halves": saved.halves, "scores": saved.scores, "steep": saved.steep}
    for kernel in (prepare_kernel, steep_prepare_kernel):
        n = call.half if kernel is steep_prepare_kernel else call.bt
        size = call.shape[3], n, call.tuning(kernel).bk
        given = rows(call, kernel, n, q=call.q, k=call.k, g=call.g)
        given |= {"qg": (saved.read, *size), "kg": (saved.write, *size)}
        call.run(kernel, programs(call, kernel, n), **engine(call, kernel, given), **kept, sums=saved.sums)
    return saved


def programs(call: Call, kernel: Any, n: int) -> int:
    """A head, of a kernel over tiles whose programs take n rows of one."""
    span = call.span if kernel in (steep_prepare_kernel, steep_gradient_kernel) else 1
    return pieces(call.tiles, span) * (call.bt // n)


Matrix = tuple[Tensor, int, int, int]  # a tensor, and how it is read: rows of so many numbers, in tiles of two sizes


def rows(call: Call, kernel: Any, n: int, **given: Tensor) -> dict[str, Matrix]:
    """`[B, T, H, K]`, n rows at a time."""
    return {name: (x, x.shape[2] * x.shape[3], n, call.tuning(kernel).bk) for name, x in given.items()}


def engine(call: Call, kernel: Any, matrices: dict[str, Matrix]) -> dict[str, Any]:
    """The matrices for the chip's copy engine, if slices of channels end where heads do and it takes all of them."""
    if call.shape[3] % call.tuning(kernel).bk == 0:
        described = {name: describe(*x) for name, x in matrices.items()}
        if None not in described.values():
            return described | {"DESC": True}
    return {name: x[0] for name, x in matrices.items()} | {"DESC": False}


def gathered(x: Tensor, group: int, dim: int = 2) -> Tensor:
    """The sum over the query heads of each group."""
    return x if group == 1 else x.unflatten(dim, (-1, group)).sum(dim + 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, chunk: int, keep_end: bool, keep_states: bool,
) -> tuple[Tensor, Tensor | None, Saved]:  # fmt: skip
    """o `[B, T, HQ, V]`, the final state if asked for, and what `backward` takes."""
    with torch.cuda.device_of(q):
        call = Call(q, k, v, g, cu_seqlens, scale, chunk, (start,))
        saved = prepare(call)
        o, kept, end = scan(call, saved, v, start, reverse=False, keep_states=keep_states, keep_end=keep_end)
        return o, end, saved._replace(states=kept)


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, cu_seqlens: Tensor | None,
    saved: Saved | None, do: Tensor, d_end: Tensor | None, scale: float, chunk: int, learned: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv in their inputs' dtypes; dg in the gate's shape, fp32, unless the gate is not `learned`; the initial
    state's if there is one."""
    with torch.cuda.device_of(q):
        packing = None if saved is None else saved.packing
        call = Call(q, k, v, g, cu_seqlens, scale, chunk, (start, do, d_end, *(saved or ())), packing=packing)
        if saved is None:
            saved = prepare(call)
            saved = saved._replace(states=states(call, saved, v, start)[0])
        back = {"reverse": True, "keep_end": start is not None}
        d_states: Tensor | None
        if call.forms_dv:
            dv = torch.empty_like(do)
            d_states, d_start = states(call, saved, do, d_end, **back)
        else:
            dv, d_states, d_start = scan(call, saved, do, d_end, keep_states=True, **back)
        learned = call.kind == CHANNEL or (learned and call.kind != NONE)  # on channels dg is a part of the rest
        if call.narrow:
            dq, dk, dg = narrow_gradients(call, saved, do, d_states, dv, learned)
        else:
            inner = products(call, saved, do, d_states, learned)
            del d_states
            dq, dk, dg = gradients(call, saved, inner, learned)
        d_start = None if d_start is None else gathered(d_start, call.group, 1)
        return dq, dk, gathered(dv, call.group), dg, d_start


def narrow_gradients(
    call: Call, saved: Saved, do: Tensor, d_states: Tensor | None, dv: Tensor, learned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `gradients`, without what `products` would have given; dv, unless it is there already, is written."""
    dq, dk, dg = torch.empty_like(call.q), torch.empty_like(call.q), room_for_dg(call, learned)
    call.run(
        narrow_gradient_kernel, pieces(call.tiles, call.span), do=do, h=saved.states, dh=d_states, dq=dq, dk=dk, dv=dv,
        dg=dg, LEARNED=learned, VALUES=call.forms_dv,
    )  # fmt: skip
    return dq, gathered(dk, call.group), in_its_shape(call, dg)


def room_for_dg(call: Call, learned: bool) -> Tensor | None:
    """Of gates without channels, of each query head its part."""
    if not learned:
        return None
    if call.kind == TOKEN:
        return call.new(*call.q.shape[:3], dtype=torch.float32)
    # one number a tile, also for tiles that packed sequences don't fill
    return call.new(call.tiles, call.heads, dtype=torch.float32).zero_()


def in_its_shape(call: Call, dg: Tensor | None) -> Tensor | None:
    """The gate's gradient from its parts."""
    if dg is None:
        return None
    return gathered(dg.sum(0), call.group, 0) if call.kind == HEAD else gathered(dg, call.group)


class Inner(NamedTuple):
    """What `products_kernel` gives."""

    x: Tensor
    y: Tensor
    flow: Tensor | None
    da: Tensor


def products(call: Call, saved: Saved, do: Tensor, d_states: Tensor | None, learned: bool) -> Inner:
    K, heads = call.shape[3], call.heads
    x, y = (call.new(call.count(call.chunk), heads, K, call.chunk) for _ in range(2))
    flow = call.new(call.tiles, heads, K, dtype=torch.float32) if learned else None
    da = call.new(call.tiles, heads, call.bt, call.bt, dtype=torch.float32)
    call.run(
        products_kernel, call.tiles * (pieces(K, call.tuning(products_kernel).bk) + 1),
        do=do, h=saved.states, dh=d_states, read=saved.read, write=saved.write, decay=saved.decay,
        x=x, y=y, flow=flow, da=da, LEARNED=learned,
    )  # fmt: skip
    return Inner(x, y, flow, da)


def gradients(
    call: Call, saved: Saved, inner: Inner, learned: bool, every: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dk, and dg if the gate is learned. Not every: dq is right, the others are not."""
    B, T, _, K, _ = call.shape
    heads = call.heads
    own, out = {"q": call.q, "k": call.k}, {"dq": torch.empty_like(call.q)}
    out["dk"] = torch.empty_like(call.q) if every else out["dq"]
    kept: dict[str, Any] = {"da": inner.da, "flow": inner.flow}
    dg: Tensor | None = None
    kernels: tuple[Any, ...] = (gradient_kernel,)
    if call.g is not None and call.kind == CHANNEL:
        dg = call.new(B, T, heads, K, dtype=torch.float32) if every else out["dq"]
        kernels = channel_gradient_kernel, steep_gradient_kernel
        own |= {"g": call.g}
        out |= {"dg": dg}
        kept |= {"halves": saved.halves, "steep": saved.steep, "sums": saved.sums, "ALL": every, "g_rows": call.g}
    else:
        dg = room_for_dg(call, learned)
        kept |= {"dg": dg, "LEARNED": learned}
    for kernel in kernels:
        n = call.half if kernel is steep_gradient_kernel else call.bt
        size = call.chunk, call.tuning(kernel).bk, n
        given = rows(call, kernel, n, **own) | {"x": (inner.x, *size), "y": (inner.y, *size)}
        # two ways in one kernel, for tiles that are full and for others, take registers that the one for steep tiles
        # hasn't, and Triton 3.6 miscompiles them in fp16
        both = kernel is not steep_gradient_kernel and call.q.dtype == torch.bfloat16
        if out_too := call.whole or both:
            given |= rows(call, kernel, n, **out)
        arguments = engine(call, kernel, given)
        arguments |= {f"{name}_rows": None if call.whole else x for name, x in out.items()}
        arguments = {**out, **arguments, **kept, "OUT": out_too and arguments["DESC"]}
        # the two ways without the gate's gradient would take up to 218, and leave no room for a third program
        two_ways = arguments["OUT"] and not call.whole
        registers = AT_MOST if two_ways and not (learned or call.kind == CHANNEL) else None
        call.run(kernel, programs(call, kernel, n), registers, **arguments)
    if not every:
        return out["dq"], out["dq"], None
    return out["dq"], gathered(out["dk"], call.group), in_its_shape(call, dg)
