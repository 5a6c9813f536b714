"""Lets flash-linear-attention tune its kernels at the benchmark's sizes once, and stores what it chose.

    python benchmarks/tune_fla.py --jobs 16 --out fla_choices
    FLA_CACHE_MODE=strict FLA_CONFIG_DIR=fla_choices python benchmarks/op.py

FLA 0.6 tries up to 260 candidates when it meets a new width, one after the other: minutes. Here `--jobs` processes
compile them beforehand into Triton's cache, each its share, on short sequences; then one process times them, by FLA's
own tuner at the size that counts, `--rep` milliseconds each. What the folder of --out holds already is kept, and not
tuned again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_CACHE_MODE", "strict")  # before FLA is imported, which reads it then

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rivals
import triton
from shapes import KINDS, SHAPES, Shape, inputs
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import AutotunerError, OutOfResources, PTXASError
from tune import precompile

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
    """One forward and backward of FLA's op, each of whose tuners times its share of the candidates with `bench`."""
    run = Autotuner.run

    def run_share(self: Any, *args: Any, **kwargs: Any) -> Any:
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
        given = [x.requires_grad_() for x in inputs(shape, kind, "usual", "cuda")]
        o = rivals.load("fla", kind)(*given)
        torch.autograd.grad(o, given, torch.randn_like(o), allow_unused=True)
        torch.cuda.synchronize()
    finally:
        Autotuner.run = run


def chosen() -> dict[str, dict[str, Any]]:
    """What every tuner of this process has settled on, in FLA's own form: a file a kernel."""
    from fla.ops.utils.cache import AutotuneKey

    found: dict[str, dict[str, Any]] = {}
    for tuner in (x for x in gc.get_objects() if isinstance(x, Autotuner)):
        name = getattr(tuner, "kernel_name", None)
        for key, config in tuner.cache.items():
            if name is None or not key:
                continue
            entry = {"autotune_key": list(key), "config": {**vars(config), "pre_hook": None}}
            file = found.setdefault(name, {"kernel_name": name, "triton_version": triton.__version__})
            file.setdefault("autotune_entries", {})[AutotuneKey.key_hash(key)] = entry
    return found


def store(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in chosen().items():
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()).get("autotune_entries", {}) if path.exists() else {}
        file["autotune_entries"] = before | file["autotune_entries"]
        path.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of gate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile beforehand")
    parser.add_argument("--rep", type=int, default=100, metavar="MS", help="that a candidate is timed for")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the choices go")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here")
    if why := rivals.missing("fla"):
        parser.error(f"flash-linear-attention doesn't run here: {why}")
    todo = [(SHAPES[name], kind) for name, kind in itertools.product(options.shapes, options.kinds)]
    if options.share:
        i, n = map(int, options.share.split("/"))
        for shape, kind in todo:
            tune(Shape(shape.name, shape.B, SHORT, shape.H, shape.K, shape.V), kind, once, (i, n))
        return 0
    if options.out.exists():
        os.environ["FLA_CONFIG_DIR"] = str(options.out)
    start = time.monotonic()
    precompile(__file__, sys.argv[1:], options.jobs)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    for shape, kind in todo:
        tune(shape, kind, briefly(options.rep))
        store(options.out)
        print(f"{shape.name} {kind}: after {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
