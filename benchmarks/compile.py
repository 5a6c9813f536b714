"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, matrix instructions.

    python benchmarks/compile.py --shapes 1.3B --kinds channel             # as they ship
    python benchmarks/compile.py --shapes 340M --kinds none --candidates    # and all that tune.py would time
    python benchmarks/compile.py --shapes 340M --chunk 256 --tokens 500     # sequences that end inside a tile
    python benchmarks/compile.py --shapes 340M --kinds head --tokens 65536 --kernels states_kernel   # that are cut
    python benchmarks/compile.py --shapes 340M --packed --tokens 65536      # packed ones
    python benchmarks/compile.py --shapes 340M --kinds head --unlearned     # of a decay that is fixed, as RetNet's

Triton compiles for Hopper wherever it is installed. A candidate that spills, or whose shared memory lets a single
program run on a multiprocessor, rarely wins; one that doesn't compile fails here. Versions of Triton differ: use that
of the GPU's machine. Columns: programs a multiprocessor (by registers and shared memory), all instructions, those
that load and store spilled registers, matrix instructions of warp groups (HGMMA) and of single warps (HMMA), waits for
the former: one a product or less, but one an instruction where the compiler gave up on overlapping them.

Exit codes: 0; 1 if what ships fails to compile; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None):
    print("TRITON_INTERPRET is set, and ignored here", file=sys.stderr)

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import table
import tune
from shapes import KINDS, SHAPES, Shape, inputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from gla_ablate.ops.checks import CHUNK_SIZES
from gla_ablate.ops.kernels import driver, valued

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
SHARED, WARPS, PROGRAMS = 228 * 1024, 64, 32  # of a multiprocessor of an H100 or H200; a program has 1 KB less
QUARTERS, REGISTERS = 4, 16384  # a warp's registers are those of one quarter
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Launch = tuple[str, Any, dict[str, Any]]  # "ships" or not, kernel, arguments
COLUMNS = ("shape", "gate", "kernel", "BK", "BV", "warps", "stages", "registers", "shared KB", "programs",
           "instructions", "spills", "HGMMA", "HMMA", "waits", "")  # fmt: skip
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)?)", re.MULTILINE)


def launches(
    given: list[torch.Tensor], chunk: int, packed: bool = False, values: bool = False, learned: bool = True
) -> list[tuple[Any, dict[str, Any]]]:
    """What a forward and a backward pass on `given` q, k, v[, g] would launch; `packed`: on two sequences a row;
    `values`: with a gate on them; not `learned`: the gate gets no gradient."""
    q, k, v, *gate = given
    g = gate[0] if gate else None
    offsets = None
    if packed:
        B, T = q.shape[:2]
        q, k, v = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v))
        g = g if g is None or g.dim() == 1 else g.reshape(1, B * T, *g.shape[2:])
        offsets = torch.tensor([0, T, B * T])
    with tune.recorded(run=False) as seen:
        if values:
            gv = torch.zeros_like(v, dtype=torch.float32)
            valued.forward(q, k, v, g, gv, None, offsets, 1.0, chunk, True)
            valued.backward(q, k, v, g, gv, None, offsets, torch.empty_like(v), None, 1.0, chunk, learned)
            return [(kernel, arguments) for kernel, _, arguments in seen]
        _, _, saved = driver.forward(q, k, v, g, None, offsets, 1.0, chunk, False, True)
        driver.backward(q, k, v, g, None, offsets, saved, torch.empty_like(v), None, 1.0, chunk, learned)
    return [(kernel, arguments) for kernel, _, arguments in seen]


def signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and alignments, as Triton finds them at a launch."""
    types, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        x = arguments[parameter.name]
        special = isinstance(x, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (special and x == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            types[parameter.name] = "*" + TYPES[x.dtype]
        elif isinstance(x, TensorDescriptor):
            types[parameter.name] = f"tensordesc<{TYPES[x.base.dtype]}[{','.join(map(str, x.block_shape))}]>"
        else:
            types[parameter.name] = "fp32" if isinstance(x, float) else "i32"
        if types[parameter.name] != "constexpr" and (isinstance(x, torch.Tensor) or (special and x % 16 == 0)):
            aligned[i,] = [["tt.divisibility", 16]]
    return types, constants, aligned


def disassembled(cubin: bytes) -> tuple[int, collections.Counter[str]]:
    """Registers a thread, and how often each instruction stands in the code ("WARPGROUP.DEPBAR" waits)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    names = INSTRUCTION.findall(code)
    return int(registers.group(1)), collections.Counter(
        name if name.startswith("WARPGROUP") else name.split(".")[0] for name in names
    )


def measure(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compile for sm_90. Raises what Triton raises."""
    types, constants, aligned = signature(kernel, arguments)
    options = {"num_warps": 4, "num_stages": 3}  # Triton's own
    options |= {name: arguments[name] for name in (*options, "maxnreg") if name in arguments}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, code = disassembled(made.asm["cubin"])
    warps, shared = options["num_warps"], made.metadata.shared
    if shared + 1024 > SHARED:
        raise ValueError(f"{shared // 1024} KB of shared memory, more than the {SHARED // 1024 - 1} of a program")
    # registers are handed out 256 at a time to a warp, and 1 KB of shared memory is kept for each program
    by_registers = QUARTERS * (REGISTERS // (-(-registers * 32 // 256) * 256)) // warps
    return {
        "registers": registers, "shared": shared, "instructions": code.total(),
        "programs": min(by_registers, SHARED // (shared + 1024), WARPS // warps, PROGRAMS),
        "spills": code["LDL"] + code["STL"], "HGMMA": code["HGMMA"], "HMMA": code["HMMA"],
        "waits": sum(n for name, n in code.items() if name.startswith("WARPGROUP.DEPBAR")),
    }  # fmt: skip


def variants(given: list[torch.Tensor], chunk: int, vary: list[str], **how: bool) -> list[Launch]:
    """What ships, and the kernels to `vary` with every candidate of `tune.py`; none twice. `how`: as `launches`."""
    found = [("ships", *launch) for launch in launches(given, chunk, **how)]
    for name, choice in [(kernel, choice) for kernel in vary for choice in tune.candidates(kernel)]:
        with tune.tuned(name, choice):
            own = [launch for launch in launches(given, chunk, **how) if launch[0].fn.__name__ == name]
        found += [("", *launch) for launch in own]
    seen: set[Any] = set()
    kept = []
    for note, kernel, arguments in found:
        key = kernel, tuple(x for x in arguments.values() if isinstance(x, (bool, int)))
        if key not in seen:
            kept.append((note, kernel, arguments))
        seen.add(key)
    return sorted(kept, key=lambda launch: launch[1].fn.__name__)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of gate")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="only these")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--chunk", type=int, default=128, choices=CHUNK_SIZES, help="chunk size")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--packed", action="store_true", help="the same tokens as packed sequences")
    parser.add_argument("--unlearned", action="store_true", help="without the gradient of gates that have no channels")
    parser.add_argument("--values", action="store_true", help="with a gate on values")
    parser.add_argument("--candidates", action="store_true", help="compile what tune.py would time, too")
    options = parser.parse_args(given)
    how = {"packed": options.packed, "values": options.values, "learned": not options.unlearned}
    few = {
        "survey_kernel",
        "states_kernel",
        "segments_kernel",
        "packing_kernel",
        "crossing_kernel",
    }  # not launched by every call
    names = sorted({name for kind in KINDS for name in tune.kernels_of(kind)} | few)
    for name in options.kernels or []:
        if name not in names:
            parser.error(f"--kernels: got {name!r}, takes {', '.join(names)}")
    print(f"triton {triton.__version__}\n\n" + table.header(COLUMNS), flush=True)
    good = True
    for name, kind in itertools.product(options.shapes, options.kinds):
        own = SHAPES[name]
        shape = Shape(name, 2 if options.packed else own.B, options.tokens, own.H, own.K, own.V)
        q, k, v, *gate = inputs(shape, kind, "usual", "cpu")
        given = [*(x.to(getattr(torch, options.dtype)) for x in (q, k, v)), *gate]
        vary = tune.kernels_of(kind) if options.candidates else []
        for note, kernel, arguments in variants(given, options.chunk, vary, **how):
            if options.kernels and kernel.fn.__name__ not in options.kernels:
                continue
            title = kernel.fn.__name__ + (" (reversed)" if arguments.get("REVERSE") else "")
            size = [str(arguments.get(x, "–")) for x in ("BK", "BV", "num_warps", "num_stages")]
            try:
                found = measure(kernel, arguments)
                cells = [str(found["registers"]), f"{found['shared'] / 1024:.0f}"]
                cells += [*(str(found[x]) for x in COLUMNS[9:-1]), note]
            except Exception as error:  # whatever the compiler raises is the row's result
                cells = [f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"]
                good = good and not note
            print(table.line([name, kind, title, *size, *cells]), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
