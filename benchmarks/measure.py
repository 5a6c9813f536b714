"""One row of the benchmark: an op's first call, its errors, and only then its speed.

Errors are taken at the very size that is timed, without an fp64 copy of it: gradients come in for the first `WINDOW`
tokens of the first sequence alone, so that no later token and no other sequence can reach them, and what comes out for
the window and for a few heads must equal fp64 on inputs cut to them. Every op gets the same tensors, and tunes itself,
if it does, at the size that counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import rivals
import torch
from shapes import Shape, inputs
from torch import Tensor

WINDOW, HEADS = 2048, 4
NAMES = ("o", "dq", "dk", "dv", "dg")
LIMIT = 1e-2  # relative error up to which a result of ours is right
WARM = 0.3  # seconds
RIVAL_LIMIT = 5e-2  # a rival keeps its speed, beside its errors, unless it is plainly wrong


@dataclass
class Row:
    op: str
    shape: Shape
    kind: str
    strength: str
    errors: dict[str, float | None] = field(default_factory=dict)  # None: not finite
    first_s: float | None = None  # the first forward + backward call: compiling, tuning
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_replay_ms: float | None = None  # as a CUDA graph; None where it can't be captured
    replay_ms: float | None = None  # forward + backward as one
    uncaptured: str = ""  # the reason
    extra_mib: float | None = None
    kept_mib: float | None = None  # from forward to backward, beyond inputs and o
    floor_forward_ms: float | None = None
    floor_both_ms: float | None = None
    fla_forward: float | None = None  # FLA's time over this op's
    fla_both: float | None = None
    fla_forward_replay: float | None = None
    fla_replay: float | None = None
    note: str = ""  # "wrong", or "failed: …" with the reason


@dataclass
class Problem:
    """Inputs `q, k, v[, g]`, what comes in for the backward pass, and the fp64 answers in the window."""

    given: list[Tensor]
    incoming: Tensor
    heads: list[int]
    want: dict[str, Tensor]
    size: dict[str, float]  # norms to measure errors against
    learned: int  # how many of the inputs get gradients in the timed calls


def cut(x: Tensor, heads: list[int]) -> Tensor:
    return x[heads] if x.dim() == 1 else x[:1, :WINDOW, heads]


def pose(shape: Shape, kind: str, strength: str, device: str = "cuda") -> Problem:
    """Softmax attention has no fp64 form of ours: PyTorch's own plain one answers for it."""
    given = inputs(shape, kind, strength, device)
    incoming = torch.randn_like(given[2])
    heads = sorted({i * (shape.H - 1) // max(HEADS - 1, 1) for i in range(HEADS)})
    small = [cut(x, heads).double().requires_grad_() for x in given]
    answer = rivals.load("math", kind) if kind == "softmax" else rivals.ours  # fp64 runs on the torch backend
    o = answer(*small)
    grads = torch.autograd.grad(o, small, cut(incoming, heads).double())
    want = dict(zip(NAMES, (o.detach(), *grads), strict=False))
    size = {name: x.norm().item() for name, x in want.items()}
    if "dg" in size:  # which vanishes under strong gates
        size["dg"] = max(size["dg"], 1e-3 * (small[0].detach() * want["dq"]).norm().item())
    return Problem(given, incoming, heads, want, size, learned=3 if kind == "head" else len(given))


def fill(row: Row, op: rivals.Op, problem: Problem) -> None:
    """Measure `op` into `row`. Raises whatever the op raises."""
    first_s, row.errors = check(op, problem)
    limit = LIMIT if row.op in rivals.OWN else RIVAL_LIMIT
    if any(error is None or not error <= limit for error in row.errors.values()):
        row.note = "wrong"
        return
    row.first_s = first_s
    speed(row, op, problem)


def check(op: rivals.Op, problem: Problem) -> tuple[float, dict[str, float | None]]:
    """Seconds of the first call, and relative errors of o and of each gradient that the op gives."""
    leaves = [x.detach().requires_grad_() for x in problem.given]
    incoming = torch.zeros_like(problem.incoming)
    incoming[:1, :WINDOW] = problem.incoming[:1, :WINDOW]
    start = settled()
    o = op(*leaves)
    grads = torch.autograd.grad(o, leaves, incoming, allow_unused=True)  # a rival's fixed decay is no input of it
    seconds = settled() - start
    errors: dict[str, float | None] = {}
    for name, got in zip(NAMES, (o.detach(), *grads), strict=False):
        if got is not None:
            off = (cut(got, problem.heads).double() - problem.want[name]).norm().item()
            errors[name] = off / max(problem.size[name], 1e-30) if got.isfinite().all() else None
    return seconds, errors


def speed(row: Row, op: rivals.Op, problem: Problem) -> None:
    """Times and, on a GPU, memory."""
    leaves = [x.detach().requires_grad_(i < problem.learned) for i, x in enumerate(problem.given)]
    learned = leaves[: problem.learned]

    def forward() -> None:
        with torch.no_grad():
            op(*leaves)

    def both() -> None:
        torch.autograd.grad(op(*leaves), learned, problem.incoming)

    both()
    extra = peak_bytes(both)
    if extra is not None:
        gradients = sum(x.numel() * x.element_size() for x in learned)
        row.extra_mib = (extra - gradients) / 2**20
        before = torch.cuda.memory_allocated()
        o = op(*leaves)
        row.kept_mib = (torch.cuda.memory_allocated() - before - o.numel() * o.element_size()) / 2**20
        del o
        warm(both)
    row.forward_ms, row.both_ms = median_ms(forward), median_ms(both)
    if extra is not None:
        try:
            row.forward_replay_ms = replayed_ms(forward)
            row.replay_ms = replayed_ms(both)
        except RuntimeError as error:  # an op that waits for the device can't be captured
            row.uncaptured = rivals.reason(error)
            torch.cuda.synchronize()


def warm(call: Callable[[], object]) -> None:
    """Until the clocks are up, which go down while a kernel compiles."""
    start = settled()
    while settled() - start < WARM:
        call()


def replayed_ms(call: Callable[[], object]) -> float:
    """Of `call` captured as a CUDA graph: what the device takes, with nothing left of the host that launches. Raises
    `RuntimeError` where it can't be."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # what holds memory of the device, other graphs too, must not go while this one is captured
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay)


def settled() -> float:
    """Now, in seconds, once the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(call: Callable[[], object]) -> int | None:
    """What `call` allocates at most at one time; PyTorch keeps no count of it on a CPU."""
    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def median_ms(call: Callable[[], object]) -> float:
    """Of warm calls; of one if it takes over a second."""
    start = settled()
    call()
    once = settled() - start
    if torch.cuda.is_available() and once < 0.5:
        import triton

        return triton.testing.do_bench(call, return_mode="median")
    times = []
    while len(times) < 5 and sum(times) < 1:
        start = settled()
        call()
        times.append(settled() - start)
    return 1e3 * median(times)
