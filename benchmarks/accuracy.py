"""How far the op is from the recurrent form in fp64: the largest error per dtype and strength of gate.

    python benchmarks/accuracy.py [--out accuracy.json]

Over all kinds of gate, at B 2, T 1000, H 4, K 128, V 256 and chunk size 64, on the GPU (without one: small, fp32, on
the torch backend). dg is measured against max(‖dg‖, 1e-3 · ‖q ∘ dq‖), everything else against its own norm.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.ops.cases import GPU, KINDS, NAMES, STRENGTHS, Case, computed, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write every error to this JSON file")
    out = parser.parse_args().out
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32,)
    size = {"B": 2, "T": 1000, "H": 4, "K": 128, "V": 256} if GPU else {}
    device = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"{device}, torch {torch.__version__}\n")
    print("| dtype | gates | " + " | ".join(NAMES) + " |")
    print("|---|---|" + "---|" * len(NAMES))
    found = []
    for dtype in dtypes:
        for strength in STRENGTHS:
            worst: dict[str, float] = {}
            for kind in KINDS:
                case = Case(kind=kind, strength=strength, **size)
                error = errors(case, computed(case, "triton" if GPU else "torch", dtype))
                found.append({"dtype": str(dtype), "strength": strength, "kind": kind, **error})
                worst = {name: max(worst.get(name, 0.0), error.get(name, 0.0)) for name in NAMES}
            row = " | ".join(f"{worst[name]:.1e}" for name in NAMES)
            print(f"| {str(dtype).removeprefix('torch.')} | {strength} | {row} |", flush=True)
    if out:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
