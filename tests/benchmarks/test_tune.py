"""The search for launch parameters: a candidate that is wrong or not reproducible never gets a time."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measure
import rivals
import tune
from shapes import KINDS, SHAPES, Shape

from gla_ablate.ops import gated_linear_attention
from gla_ablate.ops.kernels import call, tuning

SMALL = Shape("small", 1, 40, 1, 16, 16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOICE = tuning.Tuning(16, 16, 2, 1)


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> measure.Problem:
    """In fp32 without a GPU: the interpreter's 16-bit products aren't the hardware's."""

    def ours(*given):
        return gated_linear_attention(*given, backend="torch" if given[0].dtype == torch.float64 else "triton")[0]

    monkeypatch.setattr(rivals, "ours", ours)
    found = measure.pose(SMALL, "channel", "usual", DEVICE)
    if DEVICE == "cpu":
        found.given = [x.float() for x in found.given]
        found.incoming = found.incoming.float()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_ships_for_a_layer_of_the_paper_is_among_the_candidates(kind):
    for kernel in tune.kernels_of(kind):
        ships, candidates = tune.in_force(kernel, SHAPES["1.3B"]), tune.candidates(kernel)
        assert len(candidates) >= 4 and ships in candidates


def test_a_candidate_is_run_with_its_own_parameters_and_timed(problem):
    with tune.tuned("products_kernel", CHOICE), tune.recorded() as seen:
        tune.outcome(problem)
    launched = {kernel.fn.__name__: arguments for kernel, _, arguments in seen}
    assert launched["products_kernel"]["num_warps"] == 2 and launched["products_kernel"]["BV"] == 16
    assert launched["scan_kernel"]["num_warps"] != 2 or DEVICE == "cuda"
    row = tune.assess("products_kernel", CHOICE, problem)
    assert row["us"] > 0 and row["error"] < measure.LIMIT and row["note"] == ""
    assert tuning.tuning("products_kernel", torch.float32, 16, 16, 32).num_warps == 4  # as it ships again


def test_candidates_that_come_to_the_same_run_once(problem, monkeypatch):
    run = []
    monkeypatch.setattr(
        tune, "assess", lambda kernel, choice, _: run.append(choice) or {"us": 1.0, "error": 0.0, "note": ""}
    )
    choices = [tuning.Tuning(bk, 32, 8, 2) for bk in (32, 64, 128)]
    rows = tune.tune(SHAPES["B8T1024H8D64"], "channel", "products_kernel", choices, problem)
    assert len(run) == 3 and [row["bk"] for row in rows] == [64, 32, 64]  # K = 64 has no larger tile
    assert [row["note"] for row in rows] == ["ships", "", ""]


def test_a_wrong_candidate_gets_no_time(problem, monkeypatch):
    real = call.launch

    def spoil(kernel, grid, key=None, **arguments):
        real(kernel, grid, key, **arguments)
        if kernel.fn.__name__ == "products_kernel":
            arguments["da"].mul_(2)

    monkeypatch.setattr(call, "launch", spoil)
    row = tune.assess("products_kernel", CHOICE, problem)
    assert row["note"] == "wrong" and row["us"] is None and row["error"] > measure.LIMIT


def test_a_candidate_whose_bits_change_gets_no_time(problem, monkeypatch):
    real, calls = call.launch, []

    def jitter(kernel, grid, key=None, **arguments):
        real(kernel, grid, key, **arguments)
        if kernel.fn.__name__ == "products_kernel":
            calls.append(kernel)
            arguments["da"].mul_(1 + 1e-5 * len(calls))

    monkeypatch.setattr(call, "launch", jitter)
    assert tune.assess("products_kernel", CHOICE, problem)["note"] == "not the same bits"


def test_a_candidate_that_fails_says_why(problem, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(call, "launch", fail)
    assert (
        tune.assess("products_kernel", CHOICE, problem)["note"]
        == "failed: RuntimeError: out of resource: shared memory"
    )


def test_the_best_is_named_beside_what_ships(capsys):
    common = {"shape": "340M", "gate": "none", "kernel": "scan_kernel", "bv": 64, "num_warps": 4, "num_stages": 2}
    rows = [{**common, "bk": bk, "us": us, "note": note} for bk, us, note in ((64, 9.0, "ships"), (32, 5.0, ""))]
    tune.report([*rows, {**common, "bk": 16, "us": None, "note": "wrong"}])
    assert capsys.readouterr().out == (
        "\nbest:\n340M none scan_kernel: 5 µs with bk 32, bv 64, num_warps 4, num_stages 2, ships at 9 µs\n"
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    with pytest.raises(SystemExit) as stop:
        tune.main()
    assert stop.value.code == 2 and "no CUDA GPU here" in capsys.readouterr().err
    assert os.environ.get("TRITON_INTERPRET") == "1"
