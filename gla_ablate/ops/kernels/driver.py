"""Runs the kernels: `forward` and `backward` on contiguous tensors that `gla_ablate.ops.op` has checked.

Forward:  (prepare) → scan → scores → output.   Backward: (prepare) → scan, scan reversed → products, dA, dv → gradient.
Gates on channels alone need `prepare`; every other buffer has the same size for every gate, and none of them K channels of
decay for a gate without. States are recomputed in the backward; the scores are kept from the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gla_ablate.ops.kernels.common import CHANNEL, HEAD, NONE, TOKEN
from gla_ablate.ops.kernels.gradient import gradient_kernel
from gla_ablate.ops.kernels.output import output_kernel
from gla_ablate.ops.kernels.prepare import prepare_kernel
from gla_ablate.ops.kernels.products import products_kernel
from gla_ablate.ops.kernels.scan import scan_kernel
from gla_ablate.ops.kernels.scores import scores_kernel

LOG2E = 1.4426950408889634

Launch = Callable[..., None]


def launch(kernel: Any, grid: int, **arguments: Any) -> None:
    """Every launch of the package passes here, which is where tests look on."""
    if grid:
        kernel[(grid,)](**arguments)


@dataclass(frozen=True)
class Numerics:
    """How a dtype is computed with. `block`, `bound` (nats): rows of a diagonal block and its smallest step, see `chunkwise`."""

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


def gate_kind(g: Tensor | None) -> int:
    return NONE if g is None else {1: HEAD, 3: TOKEN, 4: CHANNEL}[g.dim()]


def tile(size: int, most: int) -> int:
    """The tile for a dimension: a power of two from 16 (the smallest that matrix units take) to `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


@dataclass(frozen=True)
class Layout:
    """Sizes of one call and where its sequences, tiles and chunks lie. Reads no value back from the device."""

    q: Tensor
    v: Tensor
    g: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (*self.q.shape, self.v.shape[-1])  # B, T, H, K, V

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def bt(self) -> int:
        return min(self.chunk, 64)

    def count(self, size: int) -> int:
        """How many pieces of `size` tokens there are; for packed sequences the most there can be."""
        B, T = self.q.shape[:2]
        return B * triton.cdiv(T, size) if self.cu_seqlens is None else T // size + self.sequences

    @cached_property
    def numerics(self) -> Numerics:
        return NUMERICS[self.q.dtype]

    @cached_property
    def tables(self) -> dict[str, Tensor | None]:
        """For packed sequences: (sequence, tile in it) of every tile, and each sequence's first tile and first chunk."""
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

    def arguments(self, *names: str) -> dict[str, Any]:
        """The launch arguments of those names, each decided here once."""
        B, T, H, K, V = self.shape
        wide = 64 if self.q.dtype == torch.bfloat16 else 32
        known = {
            "T": T, "NT": triton.cdiv(T, self.bt), "NC": triton.cdiv(T, self.chunk), "n_rows": B * T,
            "H": H, "K": K, "V": V, "BT": self.bt, "TPC": self.chunk // self.bt, "BK": tile(K, wide), "BV": tile(V, wide),
            "BLOCK": self.numerics.block, "LEVELS": (self.bt // self.numerics.block).bit_length() - 1,
            "GATE": gate_kind(self.g), "VARLEN": self.cu_seqlens is not None,
            "DTYPE": TL_DTYPE[self.numerics.store], "PRECISION": self.numerics.precision,
            "scale": self.scale, "bound": self.numerics.bound * LOG2E, "g": self.g,
            **self.tables,
        }  # fmt: skip
        return {name: known[name] for name in names}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.q.device, dtype=dtype or self.numerics.store)

    def slices(self, size: int) -> int:
        """Tiles of a K- or V-sized dimension."""
        return triton.cdiv(size, tile(size, 64 if self.q.dtype == torch.bfloat16 else 32))


TILES = ("cu_seqlens", "tiles", "T", "NT", "H", "BT", "VARLEN")
PRODUCT = ("DTYPE", "PRECISION")


@dataclass(frozen=True)
class Prepared:
    """q and k as the later kernels read them: with the decay to the tile's borders for gates on channels, else as given."""

    q: Tensor
    k: Tensor
    total: Tensor | None


def prepare(at: Layout, q: Tensor, k: Tensor) -> Prepared:
    B, T, H, K, _ = at.shape
    if gate_kind(at.g) != CHANNEL:
        return Prepared(q, k, None)
    n = at.count(at.bt)
    ready = Prepared(at.new(B, T, H, K), at.new(B, T, H, K), at.new(n, H, K, dtype=torch.float32))
    launch(
        prepare_kernel, n * H * at.slices(K), q=q, k=k, qg=ready.q, kg=ready.k, total=ready.total,
        **at.arguments(*TILES, "g", "K", "BK", "scale"),
    )  # fmt: skip
    return ready


def scan(
    at: Layout, a: Tensor, b: Tensor, total: Tensor | None, start: Tensor | None, *, reverse: bool, keep_end: bool
) -> tuple[Tensor, Tensor | None]:
    """States (reversed: their gradients) at every chunk `[chunks, H, K, V]`, and at the end `[N, H, K, V]`."""
    _, _, H, K, V = at.shape
    states = at.new(at.count(at.chunk), H, K, V)
    end = at.new(at.sequences, H, K, V, dtype=torch.float32) if keep_end else None
    launch(
        scan_kernel, at.sequences * H * at.slices(K) * at.slices(V),
        a=a, b=b, total=total, start=start, states=states, end=end, REVERSE=reverse, HAS_START=start is not None,
        STORE_END=keep_end,
        **at.arguments("cu_seqlens", "tile_base", "chunk_base", "g", "scale", "T", "NT", "NC", "H", "K", "V", "BT", "TPC",
                       "BK", "BV", "GATE", "VARLEN", "PRECISION"),
    )  # fmt: skip
    return states, end


def scores(at: Layout, q: Tensor, k: Tensor, ready: Prepared) -> Tensor:
    B, T, H, K, _ = at.shape
    out = at.new(B, T, H, at.chunk)
    arguments = at.arguments(*TILES, *PRODUCT, "g", "scale", "bound", "TPC", "K", "BK", "BLOCK", "LEVELS", "GATE")
    launch(
        scores_kernel, at.count(at.bt) * H * arguments["TPC"],
        q=q, k=k, qg=ready.q, kg=ready.k, total=ready.total, scores=out, **arguments,
    )  # fmt: skip
    return out


def score_gradient(at: Layout, do: Tensor, v: Tensor) -> Tensor:
    """dA = do vᵀ: the scores of do and v without a gate, in fp32, since dg is a difference of what comes of it."""
    B, T, H, _, V = at.shape
    out = at.new(B, T, H, at.chunk, dtype=torch.float32)
    arguments = at.arguments(*TILES, *PRODUCT, "bound", "TPC", "BV", "BLOCK", "LEVELS")
    arguments["BK"] = arguments.pop("BV")
    launch(
        scores_kernel, at.count(at.bt) * H * arguments["TPC"],
        q=do, k=v, qg=do, kg=v, g=None, total=None, scores=out, scale=1.0, K=V, GATE=NONE, **arguments,
    )  # fmt: skip
    return out


def output(at: Layout, a: Tensor, b: Tensor, a_scores: Tensor, states: Tensor, total: Tensor | None, *, reverse: bool) -> Tensor:
    _, _, H, _, V = at.shape
    o = torch.empty_like(b)
    launch(
        output_kernel, at.count(at.bt) * H * at.slices(V),
        a=a, b=b, scores=a_scores, states=states, total=total, o=o, REVERSE=reverse,
        **at.arguments(*TILES, *PRODUCT, "chunk_base", "g", "scale", "NC", "K", "V", "TPC", "BK", "BV", "GATE"),
    )  # fmt: skip
    return o


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, chunk: int, keep_end: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """o `[B, T, H, V]`, the final state if asked for, and the scores `[B, T, H, C]` that `backward` takes."""
    at = Layout(q, v, g, cu_seqlens, scale, chunk)
    ready = prepare(at, q, k)
    states, end = scan(at, ready.k, v, ready.total, start, reverse=False, keep_end=keep_end)
    a = scores(at, q, k, ready)
    return output(at, ready.q, v, a, states, ready.total, reverse=False), end, a


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, cu_seqlens: Tensor | None, a: Tensor,
    do: Tensor, d_end: Tensor | None, scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv in their inputs' dtypes, dg in the gate's shape and fp32, the initial state's gradient if there is one."""
    at = Layout(q, v, g, cu_seqlens, scale, chunk)
    B, T, H, K, _ = at.shape
    kind, slices = gate_kind(g), at.slices(K)
    ready = prepare(at, q, k)
    states, _ = scan(at, ready.k, v, ready.total, start, reverse=False, keep_end=False)
    d_states, d_start = scan(at, ready.q, do, ready.total, d_end, reverse=True, keep_end=start is not None)
    dv = output(at, ready.k, do, a, d_states, ready.total, reverse=True)
    x, y = at.new(B, T, H, K), at.new(B, T, H, K)
    flow = at.new(at.count(chunk), H, K, dtype=torch.float32) if kind != NONE else None
    launch(
        products_kernel, at.count(at.bt) * H * slices,
        do=do, v=v, h=states, dh=d_states, x=x, y=y, flow=flow, GATED=kind != NONE,
        **at.arguments(*TILES, *PRODUCT, "chunk_base", "NC", "K", "V", "TPC", "BK", "BV"),
    )  # fmt: skip
    del states, d_states
    da = score_gradient(at, do, v)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dg = None
    if kind != NONE:
        dg = at.new(*((B, T, H, K) if kind == CHANNEL else (slices, B, T, H)), dtype=torch.float32)
    launch(
        gradient_kernel, at.count(at.bt) * H * slices,
        q=q, k=k, qg=ready.q, kg=ready.k, total=ready.total, x=x, y=y, da=da, flow=flow, dq=dq, dk=dk, dg=dg,
        **at.arguments(*TILES, *PRODUCT, "chunk_base", "g", "scale", "bound", "NC", "n_rows", "K", "TPC", "BK", "BLOCK",
                       "LEVELS", "GATE"),
    )  # fmt: skip
    if dg is not None and kind == TOKEN:
        dg = dg.sum(0)
    elif dg is not None and kind == HEAD:
        dg = dg.sum((0, 1, 2))
    return dq, dk, dv, dg, d_start
