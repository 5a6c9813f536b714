"""Where a trial stands, as its folder tells: `status.json` while it runs, `result.json` once it has finished."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gla_ablate.status import STATUSES, read_json, write_json

USUAL = 1e15  # above any count, of seconds or steps, say


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
    seconds: float = 0.0  # of all attempts
    setup: float | None = None  # seconds of the last attempt until its first step was done
    trained: float = 0.0  # seconds since
    first_step: int = 0  # which it was
    pid: int | None = None
    host: str | None = None

    @classmethod
    def read(cls, folder: Path) -> State:
        """The state of the trial in `folder`; queued if nothing is there, or nothing that makes sense."""
        found = read_json(folder / "status.json") or {}
        state = cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})
        return state if state.makes_sense() else cls()

    def makes_sense(self) -> bool:
        numbers = [self.step, self.max_steps, self.seconds, self.trained, self.first_step]
        numbers += [x for x in (self.loss, self.tokens_per_s, self.setup) if x is not None]
        usual = all(isinstance(x, int | float) and -USUAL < x < USUAL for x in numbers)
        texts = all(x is None or isinstance(x, str) for x in (self.reason, self.started, self.updated, self.host))
        return self.status in STATUSES and usual and texts

    def write(self, folder: Path) -> None:
        write_json(folder / "status.json", asdict(self))
