"""The benchmark of training steps: that it measures what it says, and says so when it can't."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import training
import whole_run

COMMAND = ["--sizes", "tiny", "--batches", "2x16", "--device", "cpu", "--steps", "3", "--warm", "1"]


def test_a_row_has_what_a_step_takes(tmp_path, capsys):
    out = tmp_path / "training.json"
    assert training.main([*COMMAND, "--models", "gla_ablate eager", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["parameters"] == 4_206_016 and not row["note"]
    assert row["tokens_per_s"] == pytest.approx(1e3 * 32 / row["step_ms"])
    assert "| tiny | B2 T16 | gla_ablate eager | 4,206,016 |" in capsys.readouterr().out


def test_a_step_learns():
    torch.manual_seed(0)
    model, loss = training.ours("tiny", "cpu", False, "none")
    seen = []
    step = training.stepper(model, lambda tokens: (seen.append(loss(tokens)), seen[-1])[1], (2, 16), "cpu")
    for _ in range(12):
        step()
    assert seen[0].item() > seen[-1].item() + 0.1 and all(p.grad is None for p in model.parameters())


def test_the_loss_is_that_of_the_next_tokens():
    model, loss = training.ours("tiny", "cpu", False, "none")
    tokens = torch.randint(training.VOCABULARY, (2, 17))
    want = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss(tokens), want)


def test_a_rival_that_is_missing_is_named_and_our_own_failure_is_the_command_s(monkeypatch, capsys):
    def broken(size, device, vocabulary):
        raise ModuleNotFoundError("No module named 'rival'")

    monkeypatch.setitem(training.MODELS, "fla", broken)
    assert training.main([*COMMAND, "--models", "fla"]) == 0
    assert "failed: ModuleNotFoundError: No module named 'rival'" in capsys.readouterr().out
    monkeypatch.setitem(training.MODELS, "gla_ablate", broken)
    assert training.main([*COMMAND, "--models", "gla_ablate"]) == 1


def test_kernels_are_told_apart_by_name():
    found = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "matrix products",
        "scan_kernel": "op",
        "triton_red_fused_add_mul_3": "norms and element-wise",
        "void at::native::(anonymous)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser",
        "cross_entropy_kernel": "loss",
        "something": "other",
    }
    assert {name: training.kind_of(name) for name in found} == found


@pytest.mark.parametrize("text", ["16", "0x4", "ax4", "1x2x3"])
def test_a_batch_that_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="takes sequences x tokens"):
        training.pair(text)


def test_a_row_of_the_whole_runner_is_what_its_trial_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(whole_run, "STEPS", 12)
    out = tmp_path / "training.json"
    assert training.main([*COMMAND, "--models", "run.py", "--vocabulary", "256", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert not row["note"] and row["tokens_per_s"] > 0 and row["parameters"] == 142_784
    assert row["step_ms"] == pytest.approx(1e3 * 32 / row["tokens_per_s"])
    assert f"waited for data: {row['data_wait_ms']:.3f} ms a step, in the last ten" in capsys.readouterr().out


def test_a_runner_that_fails_says_why(capsys):
    too_long = ["9999x32768" if part == "2x16" else part for part in COMMAND]
    assert training.main([*too_long, "--models", "run.py", "--vocabulary", "256"]) == 1
    said = capsys.readouterr().out
    assert "failed: RuntimeError: run.py ended with 1" in said and "too few for 9999 row(s)" in said


def test_the_whole_runner_trains_on_bytes(capsys):
    with pytest.raises(SystemExit, match="2"):
        training.main([*COMMAND, "--models", "run.py"])
    assert "takes --vocabulary 256" in capsys.readouterr().err
