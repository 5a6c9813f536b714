"""Folders as finished, failed and waiting trials leave them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

STAMP = {
    "git": {"sha": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": None},
    "device": "cpu",
    "backend": "torch",
    "data": {"name": "stdlib", "bytes": 31_234_567, "sha256": "ab" * 32},
    "command": "python -m gla_ablate.trial FOLDER",
}
RESULT = {
    "steps": 40,
    "tokens": 81_920,
    "seconds": 12.5,
    "params": 1_234_567,
    "state_size": 16_384,
    "flops_per_token": 7.4e6,
    "tokens_per_s": 41_200.0,
    "peak_mem_mb": 812.25,
    "backend": "torch",
    "device": "cpu",
    "data": STAMP["data"],
}


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], bool]], None]:
    """Has every file written half, and the writing end there, that a condition is given for."""

    def arrange(where: Callable[[Path], bool]) -> None:
        write = Path.write_bytes

        def write_half(file: Path, content: bytes) -> int:
            if not where(file):
                return write(file, content)
            write(file, content[: len(content) // 2])
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_bytes", write_half)

    return arrange


class Folder:
    """Builds `experiment.json` and the trial folders beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {"name": path.name, "factors": [], "report": {}, "trials": []}

    def add(
        self,
        point: dict[str, Any],
        seed: int = 0,
        curves: dict[str, list[float] | dict[int, float]] | None = None,
        status: str | None = "finished",
        reason: str | None = None,
        stamp: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
    ) -> Path:
        """A trial whose `curves` map a tag to values by step or at steps 10, 20, …; no files if `status` is None."""
        self.record["factors"] = list(dict.fromkeys([*self.record["factors"], *point]))
        trial = self.path / f"trial{len(self.record['trials'])}-seed{seed}"
        self.record["trials"].append({"id": trial.name, "point": point, "seed": seed})
        if status is None:
            return trial
        trial.mkdir(parents=True)
        stepped = {
            tag: vs if isinstance(vs, dict) else {10 * i: v for i, v in enumerate(vs, start=1)}
            for tag, vs in (curves or {}).items()
        }
        rows = [f"{step},{tag},{value!r}\n" for tag, values in stepped.items() for step, value in values.items()]
        progress: dict[str, Any] = {"status": status}
        if status != "queued":
            progress |= {"step": max((max(v) for v in stepped.values()), default=0), "max_steps": 40, "reason": reason}
            (trial / "metrics.csv").write_text("step,metric,value\n" + "".join(rows))
            (trial / "stamp.json").write_text(json.dumps(STAMP | (stamp or {})))
        if status == "finished":
            (trial / "result.json").write_text(json.dumps(RESULT | (result or {})))
        (trial / "status.json").write_text(json.dumps(progress))
        return trial

    def fill(self, rows: Iterable[tuple[dict[str, Any], dict[int, float | None]]], **files: Any) -> None:
        """Trials of points with their validation loss by seed, None for one that failed."""
        for point, values in rows:
            for seed, value in values.items():
                curves = None if value is None else {"val/loss": [value]}
                self.add(point, seed, curves, status="failed" if value is None else "finished", **files)

    def save(self, report: dict[str, Any] | None = None, **record: Any) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        self.record |= {"report": report or {}, **record}
        (self.path / "experiment.json").write_text(json.dumps(self.record))
        return self.path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "gating")


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[[str], Folder]:
    return lambda name: Folder(tmp_path / name)
