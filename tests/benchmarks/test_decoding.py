"""What decoding costs, at a size for a CPU: every row is measured or says why not, and a file and a figure come out."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import decoding
import plot

from gla_ablate.model import build_model

SMALL = ["--dim", "32", "--layers", "2", "--heads", "2", "--vocabulary", "17", "--contexts", "20", "300", "--batches"]
SMALL += ["1", "3", "--mixers", "gla"]


def run(monkeypatch, *given: str) -> int:
    monkeypatch.setattr(sys, "argv", ["decoding.py", *SMALL, *given])
    return decoding.main()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("measure.WARM", 0.0)


def test_a_recurrent_state_costs_the_same_after_any_context(tmp_path, monkeypatch, capsys):
    out, png = tmp_path / "d.json", tmp_path / "d.png"
    assert run(monkeypatch, "--out", str(out), "--plot", str(png)) == 0
    record = json.loads(out.read_text())
    assert [(row["batch"], row["context"]) for row in record["rows"]] == [(1, 20), (1, 300), (3, 20), (3, 300)]
    state = 2 * 2 * 8 * 16 * 4  # layers · heads · K · V · 4 bytes
    assert [row["cache_mib"] for row in record["rows"]] == pytest.approx([n * state / 2**20 for n in (1, 1, 3, 3)])
    assert all(row["ms"] > 0 and not row["note"] for row in record["rows"])
    assert record["models"]["gla"]["gate"]["name"] == "data_dependent" and record["stamp"]["git"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| gla | ")]) == 4
    (tmp_path / "again.png").write_bytes(plot.draw(record))


def test_keys_and_values_grow_with_the_context(tmp_path, monkeypatch):
    out = tmp_path / "d.json"
    assert run(monkeypatch, "--mixers", "gla", "softmax", "--out", str(out)) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if row["mixer"] == "softmax"]
    token = 2 * 2 * 32 * 4  # layers · keys and values · dim · 4 bytes
    want = [B * (T + 1) * token / 2**20 for B, T in ((1, 20), (1, 300), (3, 20), (3, 300))]
    assert [row["cache_mib"] for row in rows] == pytest.approx(want) and all(row["ms"] > 0 for row in rows)


def test_a_cache_that_does_not_fit_is_not_made(monkeypatch, capsys):
    monkeypatch.setattr(decoding.LanguageModel, "new_cache", lambda self, batch, length: [torch.zeros(batch, length)])
    assert run(monkeypatch, "--memory", "0") == 0
    assert capsys.readouterr().out.count("not measured: the cache doesn't fit") == 4


def test_a_row_that_fails_says_why_and_the_rest_goes_on(monkeypatch, capsys):
    def fails(self, tokens, cache):
        raise RuntimeError("a reason")

    monkeypatch.setattr(decoding.LanguageModel, "forward", fails)
    assert run(monkeypatch) == 1
    assert capsys.readouterr().out.count("failed: RuntimeError: a reason") == 4


def test_no_row_begins_after_the_budget(monkeypatch, capsys):
    assert run(monkeypatch, "--budget", "0") == 0
    assert capsys.readouterr().out.count("left out: --budget is spent") == 4


class Keys:
    """As a KV cache has it."""

    def __init__(self, batch: int, length: int) -> None:
        self.k, self.parts, self.position = torch.zeros(batch, length, 4), {"v": [torch.zeros(batch, length, 4)]}, 0


def test_a_cache_that_grows_is_counted_filled_and_never_run_over(monkeypatch):
    model = build_model(decoding.arguments(SMALL).models["gla"], 17).eval()
    seen = []

    def step(tokens, cache):
        (layer,) = cache
        seen.append((layer.position, layer.k.std().item(), layer.parts["v"][0].std().item()))
        layer.position += 1
        return tokens

    monkeypatch.setattr(model, "new_cache", lambda batch, length: [Keys(batch, length)])
    monkeypatch.setattr(model, "forward", step)
    row = {"batch": 3, "context": 999}
    decoding.fill_in(row, model)
    assert row["cache_mib"] == pytest.approx(3 * 1000 * 8 * 4 / 2**20)
    assert {position for position, *_ in seen} == {999}
    assert all(abs(std - 1) < 0.1 for _, *stds in seen for std in stds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mixers", "perceptron"], "perceptron"),
        (["--dim", "33"], "model.expand_k: got 0.5"),
        (["--gate", "nnone"], "model.gate.name: unknown gate 'nnone', did you mean 'none'?"),
        (["--contexts", "0"], "--contexts: got 0, takes whole numbers from 1"),
        (["--batches", "0"], "--batches: got 0, takes whole numbers from 1"),
        (["--vocabulary", "0"], "--vocabulary: got 0"),
    ],
)
def test_a_mistake_in_the_command_is_told(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        decoding.arguments([*SMALL, *given])
    assert ended.value.code == 2 and message in capsys.readouterr().err
