"""A trial that `run.py` trains, for its speed: on Python's own standard library, as a user would ask for it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from gla_ablate.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60  # a log every 10, and the speed of a trial is the median of all but the first interval


def result(config: ModelConfig, batch: tuple[int, int], compiled: bool) -> dict[str, Any]:
    """`result.json` of a trial. `compiled`: as `trainer.compile: auto` is for longer ones on a GPU.

    Raises `RuntimeError` with the end of what run.py printed, if it failed.
    """
    rows, seq_len = batch
    experiment = {
        "name": "speed",
        "set": {
            "model": dataclasses.asdict(config),
            "data": {"name": "stdlib", "seq_len": seq_len, "batch_size": rows, "val_tokens": seq_len},
            "trainer": {"max_steps": STEPS, "val_every": STEPS, "compile": compiled},  # validates at the end
        },
    }
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "speed.yaml"
        file.write_text(yaml.safe_dump(experiment))
        command = [sys.executable, str(ROOT / "run.py"), str(file), "--out", place]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(place).glob("speed/*/result.json"))
        if done.returncode or not found:
            raise RuntimeError(f"run.py ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        return json.loads(found[0].read_text())
