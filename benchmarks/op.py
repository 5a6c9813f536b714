"""Time and memory of the op on one GPU, each timed call first checked against fp64.

    python benchmarks/op.py [--out op.json]

For each shape and kind of gate: medians of forward and of forward + backward in ms, and the memory that both take
beyond its inputs and gradients, in MiB. bf16 inputs, fp32 gates drawn as logsigmoid(normal) / 16. A configuration whose
result is wrong gets no time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton
from torch import Tensor

from gla_ablate.ops import gated_linear_attention

SHAPES = (  # B, T, H, K, V: layers of the 340M and 1.3B models, a long sequence, many narrow heads
    (16, 2048, 4, 128, 256),
    (16, 2048, 4, 256, 512),
    (1, 32768, 4, 256, 512),
    (4, 2048, 16, 128, 128),
)
KINDS = ("none", "head", "token", "channel")
LIMIT = 1e-2  # relative error of o and of every gradient, bf16


def arguments(kind: str, B: int, T: int, H: int, K: int, V: int) -> list[Tensor]:
    """q, k, v and, if there is one, g."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, n, device="cuda", dtype=torch.bfloat16) for n in (K, K, V))
    shapes = {"none": None, "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}
    if shapes[kind] is None:
        return [q, k, v]
    return [q, k, v, torch.nn.functional.logsigmoid(torch.randn(shapes[kind], device="cuda")) / 16]


def largest_error(given: list[Tensor]) -> float:
    """Against the torch backend in fp64, on the first sequence and its first 4096 tokens."""
    cut = [x if x.dim() == 1 else x[:1, :4096] for x in given]
    incoming = torch.randn_like(cut[2])

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [(x if dtype is None else x.to(dtype)).detach().clone().requires_grad_() for x in cut]
        o, _ = gated_linear_attention(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, incoming.to(o.dtype))]

    pairs = zip(run(None), run(torch.float64), strict=True)
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def measure(given: list[Tensor]) -> dict[str, float]:
    leaves = [x.requires_grad_() for x in given]
    incoming = torch.randn_like(given[2])

    def both() -> None:
        torch.autograd.grad(gated_linear_attention(*leaves)[0], leaves, incoming)

    both()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    own = sum(x.numel() * x.element_size() for x in leaves)  # the gradients
    extra = torch.cuda.max_memory_allocated() - before - own
    with torch.no_grad():
        forward = triton.testing.do_bench(lambda: gated_linear_attention(*leaves), return_mode="median")
    return {"forward": forward, "both": triton.testing.do_bench(both, return_mode="median"), "extra": extra / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    out = parser.parse_args().out
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, bf16\n")
    print("| B, T, H, K, V | gate | error | forward ms | forward + backward ms | extra MiB |")
    print("|---|---|---|---|---|---|")
    rows = []
    for shape in SHAPES:
        for kind in KINDS:
            given = arguments(kind, *shape)
            error = largest_error(given)
            row = {"shape": shape, "kind": kind, "error": error, **(measure(given) if error <= LIMIT else {})}
            rows.append(row)
            times = f"{row['forward']:.2f} | {row['both']:.2f} | {row['extra']:.0f}" if error <= LIMIT else "wrong | |"
            print(f"| {', '.join(map(str, shape))} | {kind} | {error:.1e} | {times} |", flush=True)
    if out:
        out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
