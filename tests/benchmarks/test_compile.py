"""What ships compiles for Hopper, which a machine without a GPU can see, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gla_ablate.ops.kernels import tuning

ROOT = Path(__file__).resolve().parents[2]
# not in the interpreter, in which the other tests of this process run the kernels
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "compile.py")]


def run(*arguments: str, command: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([*(command or COMMAND), *arguments], capture_output=True, text=True, env=environment)


def rows(text: str) -> dict[str, list[str]]:
    """The cells after the kernel's name, by its name."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[2]: row[3:] for row in cells[1:]}


CHANNEL = {"survey_kernel", "prepare_kernel", "steep_prepare_kernel", "scan_kernel", "scan_kernel (reversed)"}
CHANNEL |= {"products_kernel", "channel_gradient_kernel", "steep_gradient_kernel"}
OTHERS = {"scores_kernel", "scan_kernel", "scan_kernel (reversed)", "products_kernel", "gradient_kernel"}
NARROW = {"scan_kernel", "states_kernel (reversed)", "narrow_gradient_kernel"}
CUT = {f"{name}{way}" for name in ("states_kernel", "segments_kernel") for way in ("", " (reversed)")}
CUT |= {"packing_kernel"}
SUMS = {"survey_kernel", "packing_kernel", "segments_kernel", "segments_kernel (reversed)"}  # no matrix product


@pytest.mark.parametrize(
    ("kernels", "arguments"),
    [
        (CHANNEL, ("--shapes", "1.3B", "--kinds", "channel")),
        (CHANNEL, ("--shapes", "B8T1024H8D64", "--kinds", "channel", "--chunk", "256", "--tokens", "500")),
        (OTHERS, ("--shapes", "340M", "--kinds", "token", "--dtype", "float32")),
        (CHANNEL | CUT, ("--shapes", "1.3B", "--kinds", "channel", "--packed", "--tokens", "65500")),
        (NARROW, ("--shapes", "B8T1024H8D64", "--kinds", "head", "--chunk", "64")),
        (
            NARROW | {"packing_kernel"},  # whose segments look back
            ("--shapes", "B8T1024H8D64", "--kinds", "none", "--chunk", "64", "--packed", "--tokens", "4096"),
        ),
        (OTHERS | CUT, ("--shapes", "B8T1024H8D64", "--kinds", "token", "--packed", "--tokens", "65500")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_ships_compiles(kernels, arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert set(found) == kernels
    for name, (*_, registers, shared, programs, instructions, spills, hgmma, hmma, waits, note) in found.items():
        assert note == "ships" and 0 < int(registers) <= 255 and int(shared) < 227 and int(programs) >= 1
        assert name in SUMS or int(hgmma) + int(hmma) > 0
        assert int(waits) <= int(hgmma) and int(spills) < int(instructions) / 10


def test_without_the_gates_gradient_three_programs_share_a_multiprocessor():
    """Of packed sequences, whose two ways would take more registers than that leaves."""
    done = run("--shapes", "340M", "--kinds", "head", "--packed", "--unlearned", "--kernels", "gradient_kernel")
    registers, _shared, programs, instructions, spills, *_ = rows(done.stdout)["gradient_kernel"][-9:]
    assert int(registers) <= 168 and int(programs) == 3 and int(spills) < int(instructions) / 50


def test_what_needs_more_memory_than_there_is_fails():
    program = "import sys; sys.argv[0] = 'compile.py'; import compile as it; it.SHARED = 1024; sys.exit(it.main())"
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); "
    command = (sys.executable, "-c", path + program)
    done = run("--shapes", "340M", "--kinds", "none", "--kernels", "scores_kernel", command=command)
    assert done.returncode == 1
    assert rows(done.stdout)["scores_kernel"][-1].startswith("failed: ValueError:")


def test_candidates_stand_below_what_ships_each_once():
    done = run("--shapes", "B8T1024H8D64", "--kinds", "token", "--kernels", "scores_kernel", "--candidates")
    cells = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if "scores_k" in line]
    tiles = [(int(bk), int(warps), int(stages)) for _, _, _, _, bk, _, warps, stages, *_ in cells]
    assert done.returncode == 0 and len(tiles) > 10 and len(set(tiles)) == len(tiles)
    ships = tuning.tuning("scores_kernel", torch.bfloat16, 64, 64, 128)
    assert tiles[0] == (ships.bk, ships.num_warps, ships.num_stages)
    assert [row[-2] for row in cells] == ["ships"] + [""] * (len(cells) - 1)
    assert {bk for bk, *_ in tiles} == {32, 64}  # of 128 there are none at this width


def test_an_unknown_kernel_is_a_mistake():
    done = run("--kernels", "product_kernel")
    assert done.returncode == 2 and "got 'product_kernel', takes channel_gradient_kernel" in done.stderr
