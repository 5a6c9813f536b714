"""Lets flash-linear-attention tune its kernels at the benchmark's sizes once, and stores what it chose.

    python benchmarks/tune_fla.py --jobs 16 --out fla.json
    python benchmarks/op.py --fla-choices fla.json

FLA 0.6 tries up to 260 candidates when it meets a new width, one after the other: minutes. Here `--jobs` processes
compile them beforehand into Triton's cache, each its share, on short sequences; then one process times them, by FLA's
own tuner at the size that counts, `--rep` milliseconds each. What the file of --out knows already is kept and not tuned
again, but compiled, so that a command on the same machine finds it in Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fla_choices
import rivals
import training
import triton
from shapes import KINDS, SHAPES, Shape, inputs
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import AutotunerError, OutOfResources, PTXASError
from tune import precompile

Tuned = Callable[..., None]  # takes how to time, and the share
SHORT = 256  # tokens of a sequence on which candidates are compiled: chunks are whole, and the batch as it will be


def once(call: Callable[[], object], quantiles: Any = None, **_: Any) -> list[float]:
    """In place of a timing, where compiling is all that counts."""
    call()
    torch.cuda.synchronize()
    return [1.0, 1.0, 1.0]


def briefly(rep: int) -> Callable[..., Any]:
    def time_it(call: Callable[[], object], quantiles: Any = None, **_: Any) -> Any:
        return triton.testing.do_bench(call, warmup=max(1, rep // 4), rep=rep, quantiles=quantiles)

    return time_it


def tune(shape: Shape, kind: str, bench: Callable[..., Any], share: tuple[int, int] = (0, 1)) -> None:
    """One forward and backward of FLA's op, tuned."""

    def passes() -> None:
        given = [x.requires_grad_() for x in inputs(shape, kind, "usual", "cuda")]
        o = rivals.load("fla", kind)(*given)
        torch.autograd.grad(o, given, torch.randn_like(o), allow_unused=True)

    tuned(passes, bench, share)


def tune_training(
    size: str, batch: tuple[int, int], bench: Callable[..., Any], share: tuple[int, int] = (0, 1)
) -> None:
    """One training step of a layer of FLA's model, tuned: its gate comes in another dtype than `op.py`'s."""
    model, loss = training.fla(size, "cuda", layers=1)
    tuned(training.stepper(model, loss, batch, "cuda"), bench, share)


def tuned(work: Callable[[], None], bench: Callable[..., Any], share: tuple[int, int]) -> None:
    """`work()`, in which each of FLA's tuners times its share of the candidates with `bench`."""
    run = Autotuner.run

    def run_share(self: Any, *args: Any, **kwargs: Any) -> Any:
        if fla_choices.recall(self, args, kwargs):
            return run(self, *args, **kwargs)
        whole, self.do_bench = self.configs, bench
        part, parts = share
        try:
            for i in range(parts):  # another share where nothing of the own one runs on this chip
                self.configs = whole[(part + i) % parts :: parts] or whole[:1]
                try:
                    return run(self, *args, **kwargs)
                except (AutotunerError, OutOfResources, PTXASError):
                    self.cache.clear()
            raise RuntimeError(f"none of FLA's candidates for {self.base_fn.__name__} runs")
        finally:
            self.configs = whole

    Autotuner.run = run_share
    try:
        work()
        torch.cuda.synchronize()
    finally:
        Autotuner.run = run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of gate")
    parser.add_argument("--training", nargs="+", choices=training.SIZES, default=[], help="and models of training.py")
    parser.add_argument(
        "--batches", nargs="+", type=training.pair, default=[(16, 2048)], metavar="BxT", help="of those"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile beforehand")
    parser.add_argument("--rep", type=int, default=100, metavar="MS", help="that a candidate is timed for")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="where the choices go")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here")
    if why := rivals.missing("fla"):
        parser.error(f"flash-linear-attention doesn't run here: {why}")
    if options.out.exists():
        fla_choices.preset(options.out)
    ops = [(SHAPES[name], kind) for name, kind in itertools.product(options.shapes, options.kinds)]
    # what is tuned: its name, on a sequence that is short, as it will be
    todo: list[tuple[str, Tuned, Tuned]] = [
        (f"{shape.name} {kind}", partial(tune, replace(shape, T=SHORT), kind), partial(tune, shape, kind))
        for shape, kind in ops
    ]
    for size, (batch, length) in itertools.product(options.training, options.batches):
        short, whole = (partial(tune_training, size, (batch, T)) for T in (SHORT, length))
        todo.append((f"{size} B{batch} T{length}", short, whole))
    if options.share:
        i, n = map(int, options.share.split("/"))
        start = i * len(todo) // n  # each elsewhere, so that no two compile the same at the same time
        for name, short, _ in todo[start:] + todo[:start]:
            try:
                short(once, (i, n))
            except RuntimeError as error:  # of memory, which they share; what is left compiles when it is timed
                print(f"{name}: {rivals.reason(error)}", file=sys.stderr)
        return 0
    start = time.monotonic()
    precompile(__file__, sys.argv[1:], options.jobs)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    for name, _, whole in todo:
        whole(briefly(options.rep))
        fla_choices.store(options.out, torch.cuda.get_device_name())
        print(f"{name}: after {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
