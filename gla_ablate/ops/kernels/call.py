"""What every launch of the op needs: the sizes of a call, its numerics, and where its tiles lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gla_ablate.ops.checks import check_offsets
from gla_ablate.ops.kernels import cutting
from gla_ablate.ops.kernels.common import CHANNEL, HEAD, LOG2E, NONE, TOKEN
from gla_ablate.ops.kernels.cutting import FILLED, Segments
from gla_ablate.ops.kernels.launching import launch
from gla_ablate.ops.kernels.packing import packing_kernel
from gla_ablate.ops.kernels.scan import scan_kernel
from gla_ablate.ops.kernels.states import states_kernel
from gla_ablate.ops.kernels.tuning import Tuning, pieces, tuning

SPAN = 4
BUSY = 512  # programs: about what a chip runs at a time
LEAST = 16  # rows and columns that matrix units take at once
NARROW = 64  # channels of q and k that a program takes at once
FEWEST = 3  # segments that are worth going over a sequence twice; of states of more than 128 channels, 2
TABLES = {"tiles": 8, "tile_base": 1, "chunk_base": 1, "segments": 4, "own_segments": 3}  # numbers of 32 bits a row


@dataclass(frozen=True)
class Numerics:
    """How a dtype is computed with; `chunkwise` tells what `block` (rows) and `bound` are."""

    store: torch.dtype  # of q̂, k̂, states, scores, and the operands of products
    precision: str  # of products whose operands are fp32
    block: int
    bound: float  # log2, in 8 bits
    tile: int  # the most rows of a tile: its sums and scores must fit in shared memory several times
    keep: int  # the most rows between two states that are kept
    mild: float  # nats over half a tile up to which one anchor serves all of it


# fp16 has neither the range for states and anchored factors nor bf16's room: its products run on fp32 operands.
NUMERICS = {
    torch.bfloat16: Numerics(torch.bfloat16, "tf32", 16, -13.0, 64, 256, 60.0),
    torch.float16: Numerics(torch.float32, "tf32", 16, -13.0, 32, 32, 60.0),
    torch.float32: Numerics(torch.float32, "tf32x3", 8, -27.0, 32, 32, 4.0),
}
TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def aligned(size: int) -> int:
    """So many numbers of 32 bits, and then up to the next 16 bytes, where a table begins."""
    return 4 * pieces(size, 4)


def gate_kind(g: Tensor | None) -> int:
    return NONE if g is None else {1: HEAD, 3: TOKEN, 4: CHANNEL}[g.dim()]


@dataclass(frozen=True)
class Call:
    """One call of the op: its sizes, where its sequences, tiles and chunks lie, and every launch argument that follows.

    Reads no value back from the device.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk_size: int
    others: tuple[Tensor | None, ...] = ()  # more tensors from outside: initial state, incoming gradients
    valued: bool = False  # whether it is of a call with a gate on values, whose scores are fp32
    packing: Tensor | None = None  # the memory of `tables`, if a launch has filled it already

    @cached_property
    def chunk(self) -> int:
        return min(self.chunk_size, self.numerics.keep)

    @cached_property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, T, H (of k, v and g), K, V."""
        B, T, H, K = self.k.shape
        return B, T, H, K, self.v.shape[-1]

    @property
    def heads(self) -> int:
        """Of q."""
        return self.q.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share a head of k, v and g."""
        return self.q.shape[2] // self.k.shape[2]

    @cached_property
    def ungrouped(self) -> Call:
        """The call as it is for k and v, with as many heads in place of q's."""
        if self.group == 1:
            return self
        call = replace(self, q=self.k)
        vars(call).update(tables=self.tables, segments=self.segments)  # the first cost a launch
        return call

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @cached_property
    def bt(self) -> int:
        return min(self.chunk, self.numerics.tile)

    @cached_property
    def tiles(self) -> int:
        return self.count(self.bt)

    @property
    def whole(self) -> bool:
        """Whether no sequence ends inside a tile."""
        return self.cu_seqlens is None and self.q.shape[1] % self.bt == 0

    @cached_property
    def kind(self) -> int:
        return gate_kind(self.g)

    @cached_property
    def numerics(self) -> Numerics:
        return NUMERICS[self.q.dtype]

    @cached_property
    def key(self) -> tuple[Any, ...] | None:
        """What kernels are compiled for, but for constants that a launch has of its own; None where a tensor doesn't
        start at 16 bytes, or rows are counted in 64 bits."""
        given = [x for x in (self.q, self.k, self.v, self.g, self.cu_seqlens, *self.others) if x is not None]
        if any(x.data_ptr() % 16 for x in given) or self.q.shape[0] * self.q.shape[1] >= 2**31:
            return None
        packed = None if self.cu_seqlens is None else self.cu_seqlens.dtype
        size = (*self.q.shape[2:], *self.v.shape[2:], self.chunk, self.span, self.turns)
        return self.q.device, self.q.dtype, self.kind, packed, self.whole, self.valued, *size

    def count(self, size: int) -> int:
        """How many pieces of `size` tokens there are; for packed sequences the most there can be."""
        B, T = self.q.shape[:2]
        return B * pieces(T, size) if self.cu_seqlens is None else T // size + self.sequences

    @cached_property
    def levels(self) -> int:
        """How often a block doubles until it is a tile."""
        return (self.bt // self.numerics.block).bit_length() - 1

    @property
    def half(self) -> int:
        """Rows of a program that takes half a steep tile, where a half is as much as matrix units take."""
        return max(self.bt // 2, min(LEAST, self.bt))

    @property
    def inner(self) -> int:
        """1 if half a steep tile is two blocks of rows, 0 if it is one."""
        return self.half // self.numerics.block - 1

    @cached_property
    def span(self) -> int:
        """Tiles that a program for steep ones looks through: to begin a program in vain takes longer than to look, but
        the last ones to begin leave fewer idle if they are short (one at 4096 programs, by measurement). And those of a
        narrow head's program that loads one while it works on another, where that leaves enough programs."""
        if self.kind != CHANNEL:
            return SPAN if self.forms_dv and self.tiles * self.heads >= SPAN * FILLED else 1
        programs = self.tiles * self.heads * (self.bt // self.half)
        return next((n for n in (SPAN, SPAN // 2) if programs >= 8 * n * BUSY), 1)

    @property
    def matrices(self) -> int:
        """How many `survey_kernel` forms: to both borders of a tile, about the middle of blocks, one a level (of which
        the first is read where half a tile is two small blocks), and about the tile's middle."""
        return 2 + 1 + self.levels + 1

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.q.device, dtype=dtype or self.numerics.store)

    def new_states(self, heads: int) -> Tensor:
        return self.new(self.count(self.chunk), heads, self.shape[4], self.shape[3])

    def new_end(self, heads: int) -> Tensor:
        return self.new(self.sequences, heads, *self.shape[3:], dtype=torch.float32)

    @property
    def brief(self) -> bool:
        """Whether segments may be half as long, for programs two of which share a multiprocessor: those of narrow heads
        look back, which is soon done; but whole sequences of more than 32 channels rather have programs take turns."""
        return self.narrow and (self.cu_seqlens is not None or self.shape[3] <= NARROW // 2)

    @property
    def shortest(self) -> int:
        """Tiles in a segment, the fewest."""
        return cutting.SHORTEST // 2 if self.brief else cutting.SHORTEST

    @property
    def rows(self) -> dict[str, int]:
        """Of `TABLES`. Follow from T and N alone, and by no case: compiled graphs know them, too."""
        n = self.sequences
        return dict.fromkeys(TABLES, n) | {"tiles": self.tiles, "segments": n + self.tiles // self.shortest}

    @cached_property
    def memory(self) -> Tensor:
        """Of `tables`, each from a border of 16 bytes."""
        if self.packing is not None:
            return self.packing
        return self.new(sum(aligned(rows * TABLES[name]) for name, rows in self.rows.items()), dtype=torch.int32)

    @cached_property
    def tables(self) -> dict[str, Tensor | None]:
        """For packed sequences what `packing_kernel` tells of them."""
        made: dict[str, Tensor | None] = {"cu_seqlens": self.cu_seqlens, **dict.fromkeys(TABLES)}
        if self.cu_seqlens is None:
            return made
        if self.cu_seqlens.is_cpu:  # in the interpreter, where it costs nothing; past the tensors is another's memory
            check_offsets(self.cu_seqlens.tolist(), self.q.shape[1])
        start = 0
        for name, rows in self.rows.items():
            x = self.memory[start : start + rows * TABLES[name]]
            made[name] = x.view(torch.int64) if name == "tiles" else x
            start += aligned(x.numel())
        if self.packing is None:
            cut, n, most = self.segments, self.sequences, self.rows["segments"]
            numbers = {"N": n, "COUNT": self.tiles, "SEG": cut.size, "LONG": cut.long, "SEGMENTS": most}
            shape = {"ROOM": cut.inner, "BT": self.bt, "TPC": self.chunk // self.bt}
            launch(packing_kernel, n, self.key, **made, **numbers, **shape)
        return made

    @property
    def slices(self) -> int:
        """Of V, each a scan's program."""
        return pieces(self.shape[4], self.tuning(scan_kernel).bv)

    @cached_property
    def segments(self) -> Segments:
        """How sequences are cut for the scan: where its programs, each a sequence, would leave most of a chip idle."""
        programs, tiles, multiple = self.heads * self.slices, pieces(self.shape[1], self.bt), self.chunk // self.bt
        shortest = max(self.shortest, cutting.worth_looking_back(tiles)) if self.narrow else self.shortest
        if self.cu_seqlens is None:
            filled = 2 * FILLED if self.brief else FILLED
            fewest = FEWEST if self.shape[3] <= 128 else 2
            return cutting.cut_evenly(self.sequences, tiles, programs, filled, shortest, fewest, multiple)
        filled = FILLED if self.shape[3] > 64 else 2 * FILLED  # smaller states leave room for a second program
        return cutting.cut_packed(self.sequences, tiles, self.tiles, programs, filled, shortest, multiple)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What kernels take by these names, each decided here once."""
        _, T, H, K, V = self.shape
        return {
            "q": self.q, "k": self.k, "v": self.v, "g": self.g,
            "T": T, "NT": pieces(T, self.bt), "NC": pieces(T, self.chunk),
            "H": H, "GROUP": self.group, "K": K, "V": V,
            "SEG": self.segments.size, "NSEG": self.segments.each,
            "BT": self.bt, "TPC": self.chunk // self.bt, "COUNT": self.tiles, "SPAN": self.span,
            "BLOCK": self.numerics.block, "LEVELS": self.levels,
            "BS": self.half, "INNER": self.inner, "TWO": self.inner == 1 and self.numerics.block >= LEAST,
            "GATE": self.kind, "VARLEN": self.cu_seqlens is not None, "WHOLE": self.whole,
            "DTYPE": TL_DTYPE[self.numerics.store], "PRECISION": self.numerics.precision,
            "scale": self.scale, "BOUND": self.numerics.bound,
            "mild": self.numerics.mild * LOG2E.value,
            **self.tables,
        }  # fmt: skip

    def tuning(self, kernel: Any) -> Tuning:
        widths = self.q.shape[3], self.v.shape[3]
        given = kernel.fn.__name__, self.q.dtype, *widths, self.chunk, self.cu_seqlens is not None
        looks_back = kernel is states_kernel and self.looks_back  # of scans it follows from their tiles
        return tuning(*given, self.wide, self.forms_dv, looks_back)

    @cached_property
    def narrow(self) -> bool:
        """Whether one program takes all of a head's channels of q and k and, of gates without channels, keeps what
        products over them give; chunks are tiles then. Smaller tiles are wrong there in bf16 (Triton 3.6)."""
        if self.shape[3] > NARROW or self.kind == CHANNEL or self.valued:
            return False
        return self.chunk == self.bt == self.numerics.tile

    @cached_property
    def forms_dv(self) -> bool:
        """Whether it forms the gradient of v, too, so that back in time only states go. That moves a fifth more bytes
        and leaves a scan's program one product a tile in place of four: worth it where few programs go from tile to
        tile, each waiting for its products."""
        return self.narrow and self.shape[4] <= NARROW and self.sequences * self.heads <= FILLED

    @cached_property
    def own_scores(self) -> bool:
        """Whether scans form the scores: where that takes one program, and the decay between two rows is cheap. Else
        the forward pass keeps them for the backward. No length or number of sequences decides this, for which compiled
        graphs would be made anew."""
        cheap = self.kind == NONE or (self.kind == HEAD and self.shape[3] > NARROW // 2)
        alone = self.shape[4] <= (64 if self.q.dtype == torch.bfloat16 else 16)  # as `tuning` has scans
        return self.narrow and cheap and alone

    @cached_property
    def looks_back(self) -> bool:
        """Whether segments find out what they begin with in the kernel that goes over them, rather than from two
        launches before it: of gates without channels one state is soon read, and a program has all of it."""
        return self.narrow and self.segments.inner > 0

    @cached_property
    def turns(self) -> int:
        """Programs that go over the same tiles forward, each giving the output of every second or third: worth it where
        few programs go from tile to tile. With gates a token two were no faster at 64 channels; packed sequences are in
        segments already, or many."""
        if not self.forms_dv or self.cu_seqlens is not None or self.segments.inner:
            return 1
        if 2 * self.sequences * self.heads * self.slices > FILLED:
            return 1
        if self.shape[3] <= 32:
            return 3
        return 1 if self.kind == TOKEN else 2

    @cached_property
    def wide(self) -> bool:
        """Whether a program of a scan takes 128 columns of V rather than 64: half as long again over a tile, but q, k
        and scores are read once for both halves. Worth it where so few programs fill the chip, or segments do."""
        K, V = self.shape[3:]
        if not (64 < K <= 128 and V > 64) or not self.sequences:
            return False
        programs = self.heads * self.sequences * pieces(V, 128)
        tiles = pieces(self.shape[1], self.bt) if self.cu_seqlens is None else self.tiles // self.sequences
        return 2 * programs > FILLED or min(FILLED // programs, tiles // cutting.SHORTEST) >= FEWEST

    def run(self, kernel: Any, grid: int, registers: int | None = None, **own: Any) -> None:
        """Launches `grid` programs a query head with its `own` arguments and, for names left out, those of the call;
        `registers`, if any: the most a thread may have."""
        self.launch(kernel, grid * self.heads, registers, **own)

    def launch(self, kernel: Any, grid: int, registers: int | None = None, **own: Any) -> None:
        most = self.tuning(kernel)
        known = {**self.arguments, "BK": most.bk, "BV": most.bv, "STAGES": most.num_stages, **own}
        given = {name: known[name] for name in kernel.arg_names}
        key = self.key and (self.key, most, registers, *(x for x in own.values() if isinstance(x, bool)))
        options = {"num_warps": most.num_warps, "num_stages": most.num_stages}
        launch(kernel, grid, key, **given, **options, **({} if registers is None else {"maxnreg": registers}))
