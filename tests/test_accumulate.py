"""The batch of a step in micro-batches: the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gla_ablate.data.drawn import Examples
from gla_ablate.data.source import IGNORED
from tests.test_trial import MQAR, TRAINER, folder_for, metrics, read, run

# Relative. Adam takes a gradient of nearly 0 for a step of the usual size, whatever sign rounding gave it.
LOSS = 1e-4 if torch.cuda.is_available() else 1e-5
CURVES = {"train/loss": LOSS, "val/loss": LOSS, "lr": 0.0, "train/grad_norm": 1e-3, "gate/layer1/head0/forget": 1e-4}


@pytest.fixture
def unequal(monkeypatch):
    """Rows with other numbers of targets that count, every third with none."""
    real = Examples.__getitem__

    def read_rows(self, rows):
        batch = real(self, rows)
        for i, row in enumerate(rows):
            first = batch["targets"][i] != IGNORED
            keep = row % 3
            batch["targets"][i][first & (first.cumsum(0) > keep)] = IGNORED
        return batch

    monkeypatch.setattr(Examples, "__getitem__", read_rows)


def trained(folder: Path, accumulate: int, **parts) -> tuple[dict, dict]:
    """The curves and the result."""
    folder_for(folder, **parts, trainer=TRAINER | {"accumulate": accumulate})
    assert run(folder) == 0
    return metrics(folder), read(folder, "result.json")


def check_alike(whole, other) -> None:
    curves, result = whole
    assert {key: other[1][key] for key in ("steps", "tokens")} == {key: result[key] for key in ("steps", "tokens")}
    assert {tag: [*curve] for tag, curve in other[0].items()} == {tag: [*curve] for tag, curve in curves.items()}
    for tag, rel in CURVES.items():
        assert [*other[0][tag].values()] == pytest.approx([*curves[tag].values()], rel=rel, abs=0), tag


def test_micro_batches_train_as_the_batch_does(tmp_path):
    whole = trained(tmp_path / "1", 1)
    check_alike(whole, trained(tmp_path / "4", 4))
    weights = [
        torch.load(tmp_path / part / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for part in "14"
    ]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unequal")
def test_a_target_weighs_the_same_in_whichever_micro_batch_it_is(tmp_path):
    data = MQAR | {"batch_size": 6}
    whole = trained(tmp_path / "1", 1, data=data)
    for parts in (3, 6):
        check_alike(whole, trained(tmp_path / f"{parts}", parts, data=data))


def test_micro_batches_of_text_train_as_the_batch_does(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_ABLATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    data = {"name": "text", "seq_len": 32, "batch_size": 4, "val_tokens": 320, "files": [str(tmp_path / "text.txt")]}
    whole = trained(tmp_path / "1", 1, data=data)
    check_alike(whole, trained(tmp_path / "2", 2, data=data))
