"""Where a trial stands, as its folder tells: `status.json` while it runs, `result.json` once it has finished."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gla_ablate.status import read_json, write_json


@dataclass
class State:
    """`status.json`. The trial writes it; the launcher does before there is a process, and after one that died."""

    status: str = "queued"  # queued | running | finished | interrupted | one of `status.FAILED`
    step: int = 0
    max_steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    reason: str | None = None  # one short line, where it didn't finish
    started: str | None = None  # ISO 8601
    updated: str | None = None
    seconds: float = 0.0
    pid: int | None = None

    @classmethod
    def read(cls, folder: Path) -> State:
        """The state of the trial in `folder`; queued if nothing is there, or nothing that makes sense."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in (read_json(folder / "status.json") or {}).items() if k in known})

    def write(self, folder: Path) -> None:
        write_json(folder / "status.json", asdict(self))
