"""The op beside its rivals on one GPU, bf16 with fp32 gates: errors, time, memory, distance from what is possible.

    python benchmarks/op.py                                          # every shape, kind of gate and installed rival
    python benchmarks/op.py --shapes 340M 1.3B --kinds channel --rivals fla --out op.json --plot op.png
    python benchmarks/op.py --sweep --out sweep.json --plot sweep.png    # time against T at 32,768 tokens
    python benchmarks/op.py --forms --out forms.json --plot forms.png    # the paper's forms against T; also on a CPU

A row of the table is printed, and the JSON file replaced, as soon as it is measured:

o … dg        relative errors against fp64 (`measure.py`); dg against max(‖dg‖, 1e-3 · ‖q ∘ dq‖). Softmax attention is
              compared with PyTorch's plain form of it. Over 1e-2 (a rival: 5e-2) the row says "wrong" and has no speed.
ms            medians of `triton.testing.do_bench`, once the clocks are up. RetNet's fixed decay (gate "head") gets no
              gradient here. "replayed": captured as a CUDA graph, forward / forward + backward, so the device's own
              time; a call from Python takes 1 to 2 ms on a slow host whatever the op does, half of it in autograd.
extra MiB     peak of forward + backward beyond inputs and gradients
kept MiB      what stays from the forward to the backward pass beyond inputs and o
first call s  of the first forward + backward at that shape in this process. Kernels that Triton finds in its cache on
              disk count as compiled: for a cold start set TRITON_CACHE_DIR to an empty folder.
of the floor  the floor's time over the op's, forward / forward + backward, replayed where that can be (`floors.py`);
              the bandwidth and the rate in it are measured first
FLA's time    over the op's, forward / forward + backward: above 1× the op is faster; then the same replayed

--packed adds rows of the op on the same tokens in one row of the batch: as one sequence, and as so many packed ones,
"even" ones as long as they were, others cut anywhere, most of which end inside a tile (`rivals.py`); FLA isn't run so,
and there is no ratio. --recompute adds rows of the op with `recompute=True`, which keeps nothing for the backward but
the inputs.

FLA 0.6 tunes itself at a new width for minutes. `tune_fla.py` does that once, and --fla-choices lets it choose the same
again; what isn't stored there is still tuned. `--budget` is asked between rows: a row that has begun is finished.

Exit codes: 0; 1 if a row of ours is wrong or failed; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import floors
import forms
import measure
import rivals
import table
from measure import Row
from shapes import KINDS, SHAPES, STRENGTHS, SWEEP, Shape

FORM_LENGTHS = [128 << i for i in range(8)]
Step = tuple[Shape, str, str]  # shape, kind of gate, op


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(SHAPES)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NAME", help=f"of {names}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of gate")
    parser.add_argument("--rivals", default="auto", help='"auto" (those installed), "none", or a list: fla,flash,cudnn')
    parser.add_argument("--fla-choices", type=Path, metavar="JSON", help="what tune_fla.py stored")
    parser.add_argument("--strength", choices=STRENGTHS, default="usual", help="logsigmoid(normal) / 16; −0.01; −8")
    parser.add_argument("--packed", action="store_true", help="also the op on the same tokens as packed sequences")
    parser.add_argument("--recompute", action="store_true", help="also the op that trades time for memory")
    parser.add_argument("--sweep", action="store_true", help="T 512 … 32768, gates on channels, instead of --shapes")
    parser.add_argument("--forms", action="store_true", help="the forms of gla_ablate/ops/reference.py instead")
    parser.add_argument("--lengths", nargs="+", type=int, default=FORM_LENGTHS, metavar="T", help="of --forms")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the rows go")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where the figure goes")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="after which no row begins"
    )
    options = parser.parse_args(given)
    for name in options.shapes:
        if name not in SHAPES:
            parser.error(f"--shapes: got {name!r}, takes {names}")
    options.rivals = {"auto": list(rivals.RIVALS), "none": []}.get(options.rivals, options.rivals.split(","))
    for name in options.rivals:
        if name not in rivals.RIVALS:
            parser.error(f'--rivals: got {name!r}, takes "auto", "none", or a list of {", ".join(rivals.RIVALS)}')
    if not options.forms and not torch.cuda.is_available():
        parser.error("no CUDA GPU here: only --forms runs without one")
    return options


def plan(shapes: list[Shape], kinds: list[str], present: list[str], own: Sequence[str] = (rivals.OURS,)) -> list[Step]:
    """FLA comes before ours, whose rows show the ratio."""
    steps: list[Step] = []
    for shape in shapes:
        linear = ["fla"] * ("fla" in present) + list(own)
        steps += [(shape, kind, name) for kind in kinds for name in linear]
        steps += [(shape.softmax(), "softmax", name) for name in present if name != "fla"]
    return steps


def run(steps: list[Step], strength: str, ceilings: floors.Ceilings, record: dict[str, Any], out: Path | None,
        deadline: float = float("inf"), device: str = "cuda") -> bool:  # fmt: skip
    """Measure, print and record step by step. True if every row of ours is right."""
    print(table.header(), flush=True)
    posed: tuple[tuple[Shape, str] | None, measure.Problem | None] = (None, None)
    fla: dict[tuple[Shape, str], Row] = {}
    good = True
    for i, (shape, kind, name) in enumerate(steps):
        if time.monotonic() > deadline:
            record["left_out"] = [f"{s.name} {k} {n}" for s, k, n in steps[i:]]
            print(f"\n--budget is spent after {i} of {len(steps)} rows; left out: {', '.join(record['left_out'])}")
            break
        row = Row(name, shape, kind, strength)
        try:
            op = rivals.load(name, kind)
            if posed[0] != (shape, kind):
                posed = (None, None)  # frees the last inputs before the next are drawn
                posed = ((shape, kind), measure.pose(shape, kind, strength, device))
            measure.fill(row, op, posed[1])
        except Exception as error:  # of any kind, a rival's or ours: it is the row's result, and the rest goes on
            row.note = f"failed: {rivals.reason(error)}"
        compare(row, fla, ceilings)
        good = good and not (name in rivals.OWN and row.note)
        record["rows"].append(asdict(row))
        table.save(out, record)
        print(table.render(row), flush=True)
    table.save(out, record)
    return good


def compare(row: Row, fla: dict[tuple[Shape, str], Row], ceilings: floors.Ceilings) -> None:
    """With the floor, and with FLA's row at the same shape and gate, which `fla` collects."""
    if row.note or row.kind == "softmax":  # whose floor is another one
        return
    row.floor_forward_ms, row.floor_both_ms = floors.floor_ms(row.shape, row.kind, ceilings)
    if row.op == "fla":
        fla[row.shape, row.kind] = row
    if row.op not in rivals.ROWS and (other := fla.get((row.shape, row.kind))):
        row.fla_forward, row.fla_both = other.forward_ms / row.forward_ms, other.both_ms / row.both_ms
        row.fla_forward_replay = table.ratio(other.forward_replay_ms, row.forward_replay_ms)
        row.fla_replay = table.ratio(other.replay_ms, row.replay_ms)


def main() -> int:
    start = time.monotonic()
    options = arguments()
    if options.plot:
        import plot  # before anything is measured: it needs matplotlib
    record: dict[str, Any] = {"stamp": table.stamp(), "forms": options.forms, "rows": []}
    print(f"{record['stamp']['device']}, " + ", ".join(f"{k} {v}" for k, v in record["stamp"]["versions"].items() if v))
    if options.forms:
        good = forms.run(options.lengths, record, options.out, start + options.budget)
    else:
        shapes, kinds = [SHAPES[name] for name in options.shapes], options.kinds
        if options.sweep:
            shapes, kinds = SWEEP, ["channel"]
        record["missing"] = {name: why for name in options.rivals if (why := rivals.missing(name))}
        for name, why in record["missing"].items():
            print(f"{name} is left out: {why}")
        ceilings = floors.measured_ceilings()
        record["ceilings"] = asdict(ceilings)
        print(f"copies {ceilings.bandwidth / 1e12:.2f} TB/s, multiplies {ceilings.rate / 1e12:.0f} TFLOP/s in bf16\n")
        if options.fla_choices and "fla" not in record["missing"]:
            import fla_choices  # which needs Triton's tuner

            fla_choices.preset(options.fla_choices)
        present = [name for name in options.rivals if name not in record["missing"]]
        own = [rivals.OURS, *rivals.ROWS * options.packed, *[rivals.RECOMPUTE] * options.recompute]
        steps = plan(shapes, kinds, present, own)
        good = run(steps, options.strength, ceilings, record, options.out, start + options.budget)
    if options.plot:
        plot.write(record, options.plot)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
