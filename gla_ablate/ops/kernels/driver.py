"""Runs the kernels: `forward` and `backward` on contiguous tensors that `gla_ablate.ops.op` has checked.

Forward:  (prepare) → scan → scores → output.   Backward: (prepare) → scan, scan reversed → products, dA, dv → gradient.
Gates on channels alone need `prepare`; every other buffer has the same size for every gate, and none of them K channels
of decay for a gate without. States are recomputed in the backward; the scores are kept from the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gla_ablate.ops.kernels.common import CHANNEL, HEAD, LOG2E, NONE, TOKEN
from gla_ablate.ops.kernels.gradient import gradient_kernel
from gla_ablate.ops.kernels.output import output_kernel
from gla_ablate.ops.kernels.prepare import prepare_kernel
from gla_ablate.ops.kernels.products import products_kernel
from gla_ablate.ops.kernels.scan import scan_kernel
from gla_ablate.ops.kernels.scores import scores_kernel


def launch(kernel: Any, grid: int, **arguments: Any) -> None:
    """Every launch of the package passes here, which is where tests look on."""
    if grid:
        kernel[(grid,)](**arguments)


@dataclass(frozen=True)
class Numerics:
    """How a dtype is computed with; `chunkwise` tells what `block` (rows) and `bound` (nats) are."""

    store: torch.dtype  # of q̂, k̂, states, scores, and the operands of products
    precision: str  # of products whose operands are fp32
    block: int
    bound: float


# fp16 has neither the range for states and anchored factors nor bf16's room: its products run on fp32 operands.
NUMERICS = {
    torch.bfloat16: Numerics(torch.bfloat16, "tf32", 16, -9.0),
    torch.float16: Numerics(torch.float32, "tf32", 16, -9.0),
    torch.float32: Numerics(torch.float32, "tf32x3", 8, -19.0),
}
TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Tuning(NamedTuple):
    """Launch parameters of a kernel: the largest tiles of K and V, warps, stages of its pipelined loops."""

    bk: int
    bv: int
    num_warps: int
    num_stages: int


def tuning(kernel: str, kind: int, dtype: torch.dtype) -> Tuning:
    """Launch parameters for inputs of `dtype`, the same for any K and V.

    Chosen by the compiled kernels' registers, spills and shared memory on Hopper, not by time.
    """
    channel, narrow = kind == CHANNEL, dtype == torch.bfloat16
    if kernel == "gradient_kernel" and channel and dtype == torch.float16:
        # at 8 warps the machine code that Triton 3.6 ends in writes to a misaligned shared address (K 24, V 20 or 24)
        return Tuning(32, 64, 4, 1)
    if kernel == "gradient_kernel":
        return Tuning(32, 64, 8, 1) if channel or not narrow else Tuning(64, 64, 8, 1)
    if kernel == "scores_kernel" and channel:
        return Tuning(32, 32, 8, 1)
    return Tuning(64, 64, 4, 2) if narrow else Tuning(32, 32, 4, 2)


def gate_kind(g: Tensor | None) -> int:
    return NONE if g is None else {1: HEAD, 3: TOKEN, 4: CHANNEL}[g.dim()]


def tile(size: int, most: int) -> int:
    """The tile for a dimension: a power of two from 16 (the smallest that matrix units take) to `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


@dataclass(frozen=True)
class Call:
    """One call of the op: its sizes, where its sequences, tiles and chunks lie, and every launch argument that follows.

    Reads no value back from the device.
    """

    q: Tensor
    v: Tensor
    g: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        B, T, H, K = self.q.shape
        return B, T, H, K, self.v.shape[-1]

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def bt(self) -> int:
        return min(self.chunk, 64)

    @property
    def tiles_a_chunk(self) -> int:
        return self.chunk // self.bt

    @property
    def heads_and_tiles(self) -> int:
        return self.count(self.bt) * self.q.shape[2]

    @cached_property
    def kind(self) -> int:
        return gate_kind(self.g)

    @cached_property
    def numerics(self) -> Numerics:
        return NUMERICS[self.q.dtype]

    def count(self, size: int) -> int:
        """How many pieces of `size` tokens there are; for packed sequences the most there can be."""
        B, T = self.q.shape[:2]
        return B * triton.cdiv(T, size) if self.cu_seqlens is None else T // size + self.sequences

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.q.device, dtype=dtype or self.numerics.store)

    @cached_property
    def tables(self) -> dict[str, Tensor | None]:
        """For packed sequences: (sequence, tile in it) of every tile, each sequence's first tile and first chunk."""
        if self.cu_seqlens is None:
            return {"cu_seqlens": None, "tiles": None, "tile_base": None, "chunk_base": None}
        length = self.cu_seqlens.diff()
        n_tiles, n_chunks = (-(-length // size) for size in (self.bt, self.chunk))
        after = n_tiles.cumsum(0)
        i = torch.arange(self.count(self.bt), device=length.device, dtype=after.dtype)
        # past the last tile the table names tiles past the end of the last sequence, whose programs return at once
        n = torch.searchsorted(after, i, right=True).clamp_(max=self.sequences - 1)
        tile_base = after - n_tiles
        return {
            "cu_seqlens": self.cu_seqlens,
            "tiles": torch.stack((n, i - tile_base[n]), 1).to(torch.int32),
            "tile_base": tile_base.to(torch.int32),
            "chunk_base": (n_chunks.cumsum(0) - n_chunks).to(torch.int32),
        }

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What kernels take by these names, each decided here once."""
        B, T, H, K, V = self.shape
        return {
            "T": T, "NT": triton.cdiv(T, self.bt), "NC": triton.cdiv(T, self.chunk), "n_rows": B * T,
            "H": H, "K": K, "V": V, "BT": self.bt, "TPC": self.tiles_a_chunk,
            "BLOCK": self.numerics.block, "LEVELS": (self.bt // self.numerics.block).bit_length() - 1,
            "GATE": self.kind, "VARLEN": self.cu_seqlens is not None,
            "DTYPE": TL_DTYPE[self.numerics.store], "PRECISION": self.numerics.precision,
            "scale": self.scale, "bound": self.numerics.bound * LOG2E.value, "g": self.g,
            **self.tables,
        }  # fmt: skip

    def slices(self, kernel: Any) -> tuple[int, int]:
        """Into how many tiles a kernel cuts K and V."""
        most = tuning(kernel.fn.__name__, self.kind, self.q.dtype)
        *_, K, V = self.shape
        return triton.cdiv(K, tile(K, most.bk)), triton.cdiv(V, tile(V, most.bv))

    def run(self, kernel: Any, grid: int, **own: Any) -> None:
        """Launches `grid` programs with its `own` arguments and, for the names it leaves out, those of the call."""
        known = {**self.arguments, **own}
        most = tuning(kernel.fn.__name__, known["GATE"], self.q.dtype)
        known["BK"], known["BV"] = tile(known["K"], most.bk), tile(known["V"], most.bv)
        given = {name: known[name] for name in kernel.arg_names}
        launch(kernel, grid, **given, num_warps=most.num_warps, num_stages=most.num_stages)


class Prepared(NamedTuple):
    """q and k as later kernels read them: for gates on channels with the decay to the tile's borders."""

    q: Tensor
    k: Tensor
    total: Tensor | None


def prepare(call: Call, q: Tensor, k: Tensor) -> Prepared:
    B, T, H, K, _ = call.shape
    if call.kind != CHANNEL:
        return Prepared(q, k, None)
    qg, kg = call.new(B, T, H, K), call.new(B, T, H, K)
    total = call.new(call.count(call.bt), H, K, dtype=torch.float32)
    n_k, _ = call.slices(prepare_kernel)
    call.run(prepare_kernel, call.heads_and_tiles * n_k, q=q, k=k, qg=qg, kg=kg, total=total)
    return Prepared(qg, kg, total)


def scan(
    call: Call, a: Tensor, b: Tensor, total: Tensor | None, start: Tensor | None, *, reverse: bool, keep_end: bool
) -> tuple[Tensor, Tensor | None]:
    """States (reversed: their gradients) at every chunk `[chunks, H, K, V]`, and at the end `[N, H, K, V]`."""
    _, _, H, K, V = call.shape
    states = call.new(call.count(call.chunk), H, K, V)
    end = call.new(call.sequences, H, K, V, dtype=torch.float32) if keep_end else None
    n_k, n_v = call.slices(scan_kernel)
    call.run(
        scan_kernel, call.sequences * H * n_k * n_v, a=a, b=b, total=total, start=start, states=states, end=end,
        REVERSE=reverse, HAS_START=start is not None, STORE_END=keep_end,
    )  # fmt: skip
    return states, end


def scores(call: Call, q: Tensor, k: Tensor, ready: Prepared) -> Tensor:
    B, T, H, *_ = call.shape
    out = call.new(B, T, H, call.chunk)
    grid = call.heads_and_tiles * call.tiles_a_chunk
    call.run(scores_kernel, grid, q=q, k=k, qg=ready.q, kg=ready.k, total=ready.total, scores=out)
    return out


def score_gradient(call: Call, do: Tensor, v: Tensor) -> Tensor:
    """dA = do vᵀ: the scores of do and v without a gate, in fp32, since dg is a difference of what comes of it."""
    B, T, H, _, V = call.shape
    out = call.new(B, T, H, call.chunk, dtype=torch.float32)
    grid = call.heads_and_tiles * call.tiles_a_chunk
    call.run(
        scores_kernel, grid, q=do, k=v, qg=do, kg=v, g=None, total=None, scores=out, scale=1.0, K=V, GATE=NONE
    )  # fmt: skip
    return out


def output(
    call: Call, a: Tensor, b: Tensor, a_scores: Tensor, states: Tensor, total: Tensor | None, *, reverse: bool
) -> Tensor:
    o = torch.empty_like(b)
    _, n_v = call.slices(output_kernel)
    grid = call.heads_and_tiles * n_v
    call.run(output_kernel, grid, a=a, b=b, scores=a_scores, states=states, total=total, o=o, REVERSE=reverse)
    return o


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, chunk: int, keep_end: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """o `[B, T, H, V]`, the final state if asked for, and the scores `[B, T, H, C]` that `backward` takes."""
    with torch.cuda.device_of(q):
        call = Call(q, v, g, cu_seqlens, scale, chunk)
        ready = prepare(call, q, k)
        states, end = scan(call, ready.k, v, ready.total, start, reverse=False, keep_end=keep_end)
        a = scores(call, q, k, ready)
        return output(call, ready.q, v, a, states, ready.total, reverse=False), end, a


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, cu_seqlens: Tensor | None, a: Tensor,
    do: Tensor, d_end: Tensor | None, scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv in their inputs' dtypes; dg in the gate's shape, fp32; the initial state's if there is one."""
    with torch.cuda.device_of(q):
        call = Call(q, v, g, cu_seqlens, scale, chunk)
        B, T, H, K, _ = call.shape
        ready = prepare(call, q, k)
        states, _ = scan(call, ready.k, v, ready.total, start, reverse=False, keep_end=False)
        d_states, d_start = scan(call, ready.q, do, ready.total, d_end, reverse=True, keep_end=start is not None)
        dv = output(call, ready.k, do, a, d_states, ready.total, reverse=True)
        gated = call.kind != NONE
        x, y = call.new(B, T, H, K), call.new(B, T, H, K)
        flow = call.new(call.count(chunk), H, K, dtype=torch.float32) if gated else None
        n_k, _ = call.slices(products_kernel)
        call.run(
            products_kernel, call.heads_and_tiles * n_k,
            do=do, v=v, h=states, dh=d_states, x=x, y=y, flow=flow, GATED=gated,
        )  # fmt: skip
        del states, d_states
        da = score_gradient(call, do, v)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        n_k, _ = call.slices(gradient_kernel)
        dg = None
        if gated:
            dg = call.new(*((B, T, H, K) if call.kind == CHANNEL else (n_k, B, T, H)), dtype=torch.float32)
        call.run(
            gradient_kernel, call.heads_and_tiles * n_k,
            q=q, k=k, qg=ready.q, kg=ready.k, total=ready.total, x=x, y=y, da=da, flow=flow, dq=dq, dk=dk, dg=dg,
        )  # fmt: skip
        if dg is not None and call.kind == TOKEN:
            dg = dg.sum(0)
        elif dg is not None and call.kind == HEAD:
            dg = dg.sum((0, 1, 2))
        return dq, dk, dv, dg, d_start
