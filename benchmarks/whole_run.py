"""A trial that `run.py` trains, for its speed: on Python's own standard library, as a user would ask for it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from gla_ablate.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
LOG_EVERY = 10  # the speed of a trial is the median of the intervals between its logs, without the first


def result(config: ModelConfig, batch: tuple[int, int], device: str) -> dict[str, Any]:
    """`result.json` of a trial on `device`, "cuda" or "cpu". It is compiled on a GPU, as longer ones are by default.

    Raises `RuntimeError` with the end of what run.py printed, if it failed.
    """
    rows, seq_len = batch
    experiment = {
        "name": "speed",
        "set": {
            "model": dataclasses.asdict(config),
            "data": {"name": "stdlib", "seq_len": seq_len, "batch_size": rows, "val_tokens": seq_len},
            "trainer": {"max_steps": STEPS, "val_every": STEPS, "log_every": LOG_EVERY, "compile": device == "cuda"},
        },
    }
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "speed.yaml"
        file.write_text(yaml.safe_dump(experiment))
        command = [sys.executable, str(ROOT / "run.py"), str(file), "--out", place]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden})
        found = list(Path(place).glob("speed/*/result.json"))
        if done.returncode or not found:
            raise RuntimeError(f"run.py ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        return json.loads(found[0].read_text())
