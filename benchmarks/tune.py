"""Finds the launch parameters of `gla_ablate/ops/kernels/tuning.py` anew: times every candidate of every kernel.

    python benchmarks/tune.py --shapes 1.3B --kinds channel --out tune.json     # a minute or two a shape and gate
    python benchmarks/tune.py --shapes 340M --kernels products_kernel --jobs 16

For each shape and gate the op runs with one kernel's parameters changed, forward and backward. A candidate counts only
if everything that comes out is as right as `op.py` asks and has the same bits three times over: a race looks like a
fast kernel. Then that kernel's own launches are timed alone. Candidates are compiled beforehand by `--jobs` processes;
what Triton has compiled stays in its cache. The table says what ships and what was best; the choice is made by hand in
tuning.py, since a parameter serves many shapes.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure
import rivals
import table
from shapes import KINDS, SHAPES, STRENGTHS, Shape

Launch = tuple[Any, int, dict[str, Any]]
COLUMNS = ("shape", "gate", "kernel", "BK", "BV", "warps", "stages", "µs", "largest error", "")


def grid(bk: tuple[int, ...], bv: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...]) -> list[Any]:
    from gla_ablate.ops.kernels.tuning import Tuning

    return [Tuning(*choice) for choice in itertools.product(bk, bv, warps, stages)]


def candidates(kernel: str) -> list[Any]:
    """Tiles of K and V, warps, stages: what compiles for Hopper without many spills."""
    transposed = grid((64,), (64,), (4,), (1, 2, 3)) + grid((128,), (64,), (8,), (1, 2))
    steep = transposed + grid((16,), (64,), (1,), (2, 3, 4)) + grid((32,), (64,), (2,), (1, 2, 3))
    return {
        "prepare_kernel": transposed,
        "steep_prepare_kernel": steep,
        "scores_kernel": grid((32, 64, 128), (64,), (4, 8), (1, 2, 3)),
        "scan_kernel": grid((64, 128), (32, 64), (4,), (1, 2, 3, 4)) + grid((64, 128), (64, 128), (8,), (1, 2, 3)),
        "products_kernel": grid((32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4, 5)),
        "gradient_kernel": transposed,
        "narrow_gradient_kernel": grid((64,), (32, 64), (4, 8), (1, 2, 3)),
        "channel_gradient_kernel": transposed,
        "steep_gradient_kernel": steep,
    }[kernel]


@contextmanager
def tuned(kernel: str, choice: Any) -> Iterator[None]:
    """The op with one kernel's parameters changed, for every shape."""
    from gla_ablate.ops.kernels import tuning

    shipped = tuning.largest
    tuning.largest = lambda name, *rest: choice if name == kernel else shipped(name, *rest)
    tuning.tuning.cache_clear()
    try:
        yield
    finally:
        tuning.largest = shipped
        tuning.tuning.cache_clear()


@contextmanager
def recorded(run: bool = True) -> Iterator[list[Launch]]:
    """The launches to come, which happen if they are to `run`."""
    from gla_ablate.ops.kernels import call

    seen: list[Launch] = []
    real = call.launch

    def look_on(kernel: Any, grid: int, key: Any = None, **arguments: Any) -> None:
        seen.append((kernel, grid, arguments))
        if run:
            real(kernel, grid, key, **arguments)

    call.launch = look_on
    try:
        yield seen
    finally:
        call.launch = real


def outcome(problem: measure.Problem) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in problem.given]
    o = rivals.ours(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, problem.incoming)]


def assess(kernel: str, choice: Any, problem: measure.Problem) -> dict[str, Any]:
    """µs of the kernel's launches in one forward + backward, and what is wrong with the candidate, if anything is."""
    row: dict[str, Any] = {"kernel": kernel, **choice._asdict(), "us": None, "error": None, "note": ""}
    try:
        with tuned(kernel, choice):
            _, errors = measure.check(rivals.ours, problem)
            row["error"] = None if None in errors.values() else max(errors.values())
            if row["error"] is None or not row["error"] <= measure.LIMIT:
                return {**row, "note": "wrong"}
            with recorded() as seen:
                first = outcome(problem)
            again = [outcome(problem) for _ in range(2)]
            if not all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True)):
                return {**row, "note": "not the same bits"}
            own = [launch for launch in seen if launch[0].fn.__name__ == kernel]
            if not own:
                return {**row, "note": "not launched"}
            row["us"] = 1e3 * sum(measure.median_ms(lambda launch=launch: relaunch(*launch)) for launch in own)
    except Exception as error:  # a candidate may fail to compile or to launch in any way: the next one goes on
        row["note"] = f"failed: {rivals.reason(error)}"
    return row


def relaunch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    if arguments.get("flags") is not None:  # else nobody would wait; a µs or two more
        arguments["flags"].zero_()
    kernel[(programs,)](**arguments)


def kernels_of(kind: str) -> list[str]:
    channel = ["prepare_kernel", "steep_prepare_kernel", "scan_kernel", "products_kernel"]
    channel += ["channel_gradient_kernel", "steep_gradient_kernel"]
    others = ["scores_kernel", "scan_kernel", "products_kernel", "gradient_kernel", "narrow_gradient_kernel"]
    return channel if kind == "channel" else others


def in_force(kernel: str, shape: Shape) -> Any:
    """The launch parameters of a kernel at a shape: what ships, or under `tuned` what the choice comes to there."""
    from gla_ablate.ops.kernels import driver, passes
    from gla_ablate.ops.op import auto_chunk

    chunk = auto_chunk("triton", shape.K)
    k, v = (torch.empty(shape.B, shape.T, shape.H, n, device="meta", dtype=torch.bfloat16) for n in (shape.K, shape.V))
    known = vars(driver) | vars(passes)
    return driver.Call(k, k, v, None, None, 1.0, chunk).tuning(known[kernel])


def tune(shape: Shape, kind: str, kernel: str, choices: list[Any], problem: measure.Problem) -> list[dict[str, Any]]:
    """What ships, then the candidates; a line each as soon as it is known. A candidate is told by what it comes to at
    this shape, and run once."""
    rows = []
    ships = in_force(kernel, shape)
    distinct: dict[Any, Any] = {ships: ships}
    for choice in choices:
        with tuned(kernel, choice):
            distinct.setdefault(in_force(kernel, shape), choice)
    for i, (what, choice) in enumerate(distinct.items()):
        row = {"shape": shape.name, "gate": kind, **assess(kernel, choice, problem), **what._asdict()}
        row["note"] = row["note"] or ("ships" if i == 0 else "")
        rows.append(row)
        size = [str(row[name]) for name in ("bk", "bv", "num_warps", "num_stages")]
        cells = [table.number(row["us"], ".0f"), table.number(row["error"], ".1e"), row["note"]]
        print(table.line([shape.name, kind, kernel, *size, *cells]), flush=True)
    return rows


def precompile(script: str, arguments: list[str], jobs: int) -> None:
    """The same command in `jobs` processes, each with its share of the candidates at a small size."""
    command = [sys.executable, script, *arguments, "--share"]
    processes = [subprocess.Popen([*command, f"{i}/{jobs}"], stdout=subprocess.DEVNULL) for i in range(jobs)]
    for process in processes:
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of gate")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="only these")
    parser.add_argument(
        "--strength", choices=STRENGTHS, default="usual", help="strong: the kernels of steep tiles, too"
    )
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile beforehand")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the rows go")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here")
    if options.jobs and not options.share:
        precompile(__file__, sys.argv[1:], options.jobs)
    record: dict[str, Any] = {"stamp": table.stamp(), "rows": []}
    print(table.header(COLUMNS), flush=True)
    part, parts = map(int, (options.share or "0/1").split("/"))
    for name, kind in itertools.product(options.shapes, options.kinds):
        shape = SHAPES[name]
        if options.share:
            shape = Shape(shape.name, 1, 256, shape.H, shape.K, shape.V)
        problem = measure.pose(shape, kind, options.strength)
        for kernel in kernels_of(kind):
            if options.kernels and kernel not in options.kernels:
                continue
            if kernel.startswith("steep") and options.strength != "strong":
                continue  # which has nothing to do at other gates
            record["rows"] += tune(shape, kind, kernel, candidates(kernel)[part::parts], problem)
            if not options.share:
                table.save(options.out, record)
    if not options.share:
        report(record["rows"])
    return 0


def report(rows: list[dict[str, Any]]) -> None:
    """The best of each kernel beside what ships."""
    print("\nbest:")
    for key, group in itertools.groupby(rows, lambda row: (row["shape"], row["gate"], row["kernel"])):
        timed = [row for row in group if row["us"] is not None]
        now = next((row for row in timed if row["note"] == "ships"), None)
        if timed:
            best = min(timed, key=lambda row: row["us"])
            size = ", ".join(f"{name} {best[name]}" for name in ("bk", "bv", "num_warps", "num_stages"))
            against = "" if now is None else f", ships at {now['us']:.0f} µs"
            print(f"{' '.join(key)}: {best['us']:.0f} µs with {size}{against}")


if __name__ == "__main__":
    sys.exit(main())
