"""Folders of trials that have trained for a few steps, for the tests of what is done with their weights."""

from __future__ import annotations

from pathlib import Path

from tests.test_trial import MODEL, TRAINER, folder_for, run


def gate_per_head(name: str, more: str = "") -> str:
    """The file of a plugin's gate, one decay a head and token; `more` stands in its class."""
    return f"""
import torch
from gla_ablate.model import Gate, GateShape, register_gate

@register_gate("{name}")
class PerHead(Gate):
    decay_shape = "[B,T,H]"

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(shape.dim, shape.heads)

    def forward(self, x):
        return torch.nn.functional.logsigmoid(self.proj(x).float())
{more}"""


def trained_on_text(base: Path, **parts) -> Path:
    """A trial on text files in `base` that don't stay: weights are of use without the data."""
    files = {"text.txt": "the quick brown fox jumps über the lazy dog. " * 100, "val.txt": "five dozen jugs. " * 40}
    for name, text in files.items():
        (base / name).write_text(text, encoding="utf-8")
    data = {"name": "text", "seq_len": 32, "batch_size": 4, "val_tokens": 320}
    data |= {"files": [str(base / "text.txt")], "val_files": [str(base / "val.txt")]}
    given = {"model": MODEL, "data": data, "trainer": TRAINER | {"max_steps": 4, "val_every": 4}, "seed": 3} | parts
    folder = folder_for(base / "trial", **given)
    assert run(folder) == 0
    for name in files:
        (base / name).unlink()
    return folder
