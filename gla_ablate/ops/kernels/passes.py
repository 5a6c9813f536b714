"""Passes over sequences, forward and back in time: with an output, or of states alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gla_ablate.ops.kernels.call import Call
from gla_ablate.ops.kernels.common import CHANNEL, NONE, TOKEN
from gla_ablate.ops.kernels.descriptors import describe
from gla_ablate.ops.kernels.saved import Saved
from gla_ablate.ops.kernels.scan import scan_kernel
from gla_ablate.ops.kernels.segments import segments_kernel
from gla_ablate.ops.kernels.states import states_kernel
from gla_ablate.ops.kernels.tuning import pieces

NOT_CUT: dict[str, Any] = {"borders": None, "passed": None, "flags": None, "CUT": False, "LOOKS_BACK": False}


def scan(
    call: Call, saved: Saved, x: Tensor, start: Tensor | None, *, reverse: bool, keep_states: bool, keep_end: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o, the states at every chunk, and at the end `[N, H, K, V]`. Reversed dv, the states' gradients and the initial
    state's: of each query head its part."""
    B, T, _, _, V = call.shape
    a, b = (saved.write, saved.read) if reverse else (saved.read, saved.write)
    heads = call.heads if reverse else call.shape[2]
    o = x.new_empty(B, T, call.heads, V)
    states = call.new_states(heads) if keep_states else None
    end = call.new_end(heads) if keep_end else None
    start = shared_out(start, call.group) if reverse else start
    slices, turns = call.slices, 1 if reverse else call.turns
    call.run(
        scan_kernel, call.segments.total * slices * turns,
        **operands(call, scan_kernel, {"a": a, "b": b}, {"x": x, "o": o}, {"scores": saved.scores}, not reverse),
        start=start, **between(call, saved, x, start, reverse, heads, slices), states=states, end=end,
        decay=saved.decay, REVERSE=reverse, HAS_START=start is not None, STORE_STATES=keep_states,
        STORE_END=keep_end, OWN=call.own_scores, TURNS=turns,
    )  # fmt: skip
    return o, states, end


def states(
    call: Call, saved: Saved, x: Tensor, start: Tensor | None, *, reverse: bool = False, keep_end: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `scan` gives them, where its output isn't needed."""
    call = call if reverse else call.ungrouped
    made, end = call.new_states(call.heads), call.new_end(call.heads) if keep_end else None
    start = shared_out(start, call.group)
    inner = between(call, saved, x, start, reverse, call.heads, states_programs(call))
    states_pass(
        call, saved.read if reverse else saved.write, x, saved.decay, start=start, **inner, states=made, end=end,
        REVERSE=reverse, HAS_START=start is not None, ENDS=False, STORE_END=keep_end,
    )  # fmt: skip
    return made, end


def between(
    call: Call, saved: Saved, x: Tensor, start: Tensor | None, reverse: bool, heads: int, programs: int
) -> dict[str, Any]:
    """Arguments of a kernel that goes over segments, of `heads` and so many programs a segment and head: what those of
    sequences that are cut begin with, or where they tell each other."""
    if not call.segments.inner:
        return NOT_CUT
    if not call.looks_back:
        return NOT_CUT | {"borders": borders(call, saved, x, start, reverse), "CUT": True}
    inner, (K, V) = call.segments.inner, call.shape[3:]
    return NOT_CUT | {
        "borders": call.new(inner, heads, V, K, dtype=torch.float32),
        "passed": None if call.kind == NONE else call.new(inner, heads, dtype=torch.float32),
        "flags": call.new(inner, heads, programs, dtype=torch.int32).zero_(),
        "LOOKS_BACK": True,
    }


def borders(call: Call, saved: Saved, x: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
    """What the segments of sequences that are cut begin with, `[segments, heads, K, V]`."""
    if not reverse:
        call = call.ungrouped  # query heads have no part in it
    inner, (K, V) = call.segments.inner, call.shape[3:]
    made = call.new(inner, call.heads, K, V, dtype=torch.float32)
    shape = {CHANNEL: (K,), TOKEN: ()}.get(call.kind)
    passed = None if shape is None else call.new(inner, call.heads, *shape, dtype=torch.float32)
    ends = NOT_CUT | {"borders": made, "passed": passed}
    states_pass(
        call, saved.read if reverse else saved.write, x, saved.decay, start=None, **ends, states=None, end=None,
        REVERSE=reverse, HAS_START=False, ENDS=True, STORE_END=False,
    )  # fmt: skip
    block = call.tuning(segments_kernel)
    call.run(
        segments_kernel, call.sequences * pieces(K, block.bk) * pieces(V, block.bv), passed=passed, start=start,
        borders=made, REVERSE=reverse, HAS_START=start is not None,
    )  # fmt: skip
    return made


def states_programs(call: Call) -> int:
    """Of a segment and head."""
    block = call.tuning(states_kernel)
    return pieces(call.shape[3], block.bk) * pieces(call.shape[4], block.bv)


def states_pass(call: Call, b: Tensor, x: Tensor, decay: Tensor | None, **own: Any) -> None:
    full = own["ENDS"] and not own["REVERSE"]  # a segment with another behind it has no tile that isn't
    call.run(
        states_kernel, call.segments.total * states_programs(call),
        **operands(call, states_kernel, {"b": b}, {"x": x}, {}, full), decay=decay, value_decay=None, VALUED=False,
        **own,
    )  # fmt: skip


def shared_out(x: Tensor | None, group: int) -> Tensor | None:
    """Of what each head gets, `[N, H, K, V]`, the parts of its query heads, which add up to it: the first's is all."""
    if x is None or group == 1:
        return x
    parts = x.new_zeros(x.shape[0], x.shape[1], group, *x.shape[2:])
    parts[:, :, 0] = x
    return parts.flatten(1, 2)


def operands(
    call: Call, kernel: Any, tiles: dict[str, Tensor], values: dict[str, Tensor], scores: dict[str, Tensor], full: bool
) -> dict[str, Any]:
    """The operands of a scan, through the chip's copy engine where they can be and it pays. `full`: even where a
    sequence ends inside a tile, the kernel reads and writes `values` so for tiles that are full alone."""
    _, _, _, K, V = call.shape
    most = call.tuning(kernel)
    plain: dict[str, Any] = {**tiles, **scores, **values, "DESC": False, "DESC_X": False}
    plain |= {f"{name}_rows": None if call.whole else y for name, y in values.items()}
    channel = call.kind == CHANNEL
    if most.bk >= K or not (channel or K % most.bk == 0):  # at one slice of K pointers are as fast, and cost less here
        return plain
    made = {name: describe(y, K if channel else y.shape[2] * K, call.bt, most.bk) for name, y in tiles.items()}
    made |= {name: describe(y, call.bt, call.bt, call.bt) for name, y in scores.items()}
    if None in made.values():
        return plain
    own = {name: describe(y, y.shape[2] * V, call.bt, most.bv) for name, y in values.items()}
    if not (call.whole or full) or V % most.bv or None in own.values() or values["x"].dtype != call.numerics.store:
        own = {}
    return {**plain, **made, **own, "DESC": True, "DESC_X": bool(own)}
