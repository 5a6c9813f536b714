r"""Gates on value channels too: S_t = (α_tᵀ β_t) ∘ S_{t−1} + k_tᵀ v_t, with α = exp(g) and β = exp(gv).

Keys and values have the same part in it, so each axis of the state goes through the kernels that the other does:

    A  = q kᵀ under α                o  = A v under β       dv = Aᵀ do under β
    dA = do vᵀ under β               dq = dA k under α      dk = dAᵀ q under α

`prepare` makes scores of q and k and, with do and v in their place, dA; the gradient kernels make dq, dk and dg of dA
and, with A in its place, o, dv and dgv. Between tiles, states decay along both axes (`states_kernel`), and
`crossing_kernel` takes what each axis reads from them and writes to them. A chunk is a tile here, and nothing but the
inputs is kept for the backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gla_ablate.ops.kernels import driver
from gla_ablate.ops.kernels.call import Call
from gla_ablate.ops.kernels.common import CHANNEL
from gla_ablate.ops.kernels.crossing import crossing_kernel
from gla_ablate.ops.kernels.cutting import Segments
from gla_ablate.ops.kernels.decay import survey_kernel
from gla_ablate.ops.kernels.driver import Inner, gathered
from gla_ablate.ops.kernels.passes import NOT_CUT, shared_out, states_programs
from gla_ablate.ops.kernels.saved import Saved
from gla_ablate.ops.kernels.states import states_kernel
from gla_ablate.ops.kernels.tuning import pieces


class Gradients(NamedTuple):
    """dq, dk, dv in their inputs' dtypes; dg in the gate's shape, fp32, unless there is none; dgv; the initial state's,
    if there is one."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dgv: Tensor
    d_start: Tensor | None


def key_axis(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float, chunk: int,
    others: tuple[Tensor | None, ...],
) -> Call:  # fmt: skip
    """The call as it is without a gate on values, in chunks of a tile, and no sequence cut."""
    call = Call(q, k, v, g, cu_seqlens, scale, chunk, others, valued=True)
    call = replace(call, chunk_size=call.bt)
    tiles = call.tiles if cu_seqlens is not None else pieces(call.shape[1], call.bt)
    vars(call)["segments"] = Segments(max(tiles, 1), max(tiles, 1), 1, call.sequences, 0)
    return call


def value_axis(call: Call, x: Tensor, gv: Tensor) -> Call:
    """The call with values for keys and x `[B, T, HQ or H, V]` for queries."""
    side = replace(call, q=x, k=call.v, v=call.k, g=gv, scale=1.0)
    vars(side).update(tables=call.tables, segments=call.segments)
    return side


def steepness(call: Call, saved: Saved) -> Tensor | None:
    """`[tiles, H]`: which tiles are steep along the axis of keys, see `Saved`; None without a gate on them."""
    if call.g is None or saved.steep is not None:
        return saved.steep
    B, T, H = call.shape[:3]
    marks, sums = call.new(call.tiles, H, dtype=torch.int32), call.new(call.matrices, call.bt, call.bt)
    g = call.g.expand(B, T, H).contiguous()  # one channel a head
    call.launch(survey_kernel, call.matrices + call.tiles * H, g=g, K=1, sums=sums, steep=marks)
    return marks


def states(
    call: Call, write: Tensor, x: Tensor, decay: Tensor | None, value_decay: Tensor, start: Tensor | None,
    reverse: bool, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """At the border of every tile, `[tiles, HB, V, K]`, and if asked for at the end, `[N, HB, K, V]`; x in tiles."""
    call = call if reverse else call.ungrouped
    made, end = call.new_states(call.heads), call.new_end(call.heads) if keep else None
    start = shared_out(start, call.group) if reverse else start
    call.run(
        states_kernel, call.sequences * states_programs(call), **NOT_CUT, b=write, x=x, decay=decay,
        value_decay=value_decay, start=start, states=made, end=end, REVERSE=reverse, HAS_START=start is not None,
        ENDS=False, VALUED=True, STORE_END=keep, DESC=False, DESC_X=False,
    )  # fmt: skip
    return made, end


def crossing(
    call: Call, saved: Saved, h: Tensor, dh: Tensor | None, keys: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, y and flow of `crossing_kernel`; call and saved are of the axis that is summed."""
    _, _, _, summed, rows = call.shape  # that axis has the place of K in its own call
    block = call.tuning(crossing_kernel)
    x, y = (call.new(call.count(call.bt), call.heads, rows, call.bt) if n else None for n in (True, dh is not None))
    flow = None if dh is None else call.new(call.tiles, call.heads, rows, dtype=torch.float32)
    call.run(
        crossing_kernel, call.tiles * pieces(rows, block.bv), h=h, dh=dh, read=saved.read, write=saved.write,
        decay=saved.decay, x=x, y=y, flow=flow, ROWS=rows, SUMMED=summed, BR=block.bv, BS=block.bk, KEYS=keys,
        BOTH=dh is not None,
    )  # fmt: skip
    assert x is not None
    return x, y, flow


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, start: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, chunk: int, keep_end: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o `[B, T, HQ, V]`, and the final state if asked for."""
    with torch.cuda.device_of(q):
        call = key_axis(q, k, v, g, cu_seqlens, scale, chunk, (gv, start))
        side = value_axis(call, v, gv)
        saved, own = driver.prepare(call), driver.prepare(side)
        assert own.decay is not None
        h, end = states(call, saved.write, own.write, saved.decay, own.decay, start, False, keep_end)
        x, _, _ = crossing(call, saved, h, None, keys=False)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        reader = value_axis(call, o, gv)
        o, _, _ = driver.gradients(reader, own, Inner(x, x, None, turned(saved.scores)), True, every=False)
        return o, end


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor, start: Tensor | None, cu_seqlens: Tensor | None,
    do: Tensor, d_end: Tensor | None, scale: float, chunk: int, learned: bool,
) -> Gradients:  # fmt: skip
    with torch.cuda.device_of(q):
        call = key_axis(q, k, v, g, cu_seqlens, scale, chunk, (gv, start, do, d_end))
        side = value_axis(call, do, gv)
        saved, own = driver.prepare(call), driver.prepare(side)
        assert own.decay is not None
        h, _ = states(call, saved.write, own.write, saved.decay, own.decay, start, False, False)
        dh, d_start = states(call, saved.read, own.read, saved.decay, own.decay, d_end, True, start is not None)
        along_k = crossing(side, own, h, dh, keys=True)
        along_v = crossing(call, saved, h, dh, keys=False)
        del h, dh
        if (marks := steepness(call, saved)) is not None and own.steep is not None:
            # a pair that doesn't cross a step may outweigh those that do by the decay along the other axis, too
            # 2: the steep kernels of an axis have not looked for steps to cut in a tile that is mild along it
            either = marks | own.steep | 2 * (marks != own.steep).to(marks.dtype)
            saved, own = saved._replace(steep=either), own._replace(steep=either)
        learned = g is not None and (learned or call.kind == CHANNEL)
        dq, dk, dg = driver.gradients(call, saved, inner(along_k, own.scores), learned)
        _, dv, dgv = driver.gradients(side, own, inner(along_v, saved.scores), True)
        assert dgv is not None
        return Gradients(dq, dk, dv, dg, dgv, None if d_start is None else gathered(d_start, call.group, 1))


def inner(found: tuple[Tensor, Tensor | None, Tensor | None], scores: Tensor) -> Inner:
    x, y, flow = found
    assert y is not None
    return Inner(x, y, flow, turned(scores))


def turned(scores: Tensor) -> Tensor:
    """`[tiles, HQ, BT, BT]` as `products_kernel` gives dA: what is read comes first."""
    return scores.mT.contiguous()
