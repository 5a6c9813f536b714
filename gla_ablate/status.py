"""`status.json` of a trial: where it stands, for whoever watches. Needs the standard library alone."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# How a trial can have failed, and those of it that are no fault of the trial, so that the same command runs it again.
FAILED = ("failed", "diverged", "out of memory", "out of time", "killed", "disk full")
LOST = ("killed", "disk full")
STATUSES = ("queued", "running", "finished", "interrupted", *FAILED)


def write_json(path: Path, value: Any) -> None:
    replace(path, (json.dumps(value, indent=2) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a reader sees the old content or the new, never half of it. A folder in its place is
    set aside, and no link is followed."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)  # of an earlier process with that id, or a link to anywhere
    try:
        unfinished.write_bytes(content)
        if path.is_dir() and not path.is_symlink():
            set_aside(path)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file or folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None if there is none, or nothing that makes sense."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def set_aside(path: Path) -> Path:
    """Rename a damaged file, out of the way and not lost; its new path."""
    for i in itertools.count():
        aside = path.with_name(f"{path.name}.damaged{i or ''}")
        if not aside.exists():
            break
    return path.rename(aside)


class Status:
    """The status of the trial that runs in this process, written to `path` at most `1 / every` times a second.

    `status` is running | finished | interrupted | one of `FAILED`; before there is a process, a launcher has written
    "queued".
    """

    def __init__(self, path: Path, every: float = 0.5) -> None:
        self.path = path
        self.every = every
        self.step = 0
        self.max_steps = 0
        self.loss: float | None = None
        self.tokens_per_s: float | None = None
        self.before = 0.0  # seconds of attempts that this one goes on from
        self.setup: float | None = None  # seconds of this attempt until its first step was done
        self.first_step = 0  # which that was
        self._started = datetime.now(UTC)
        self._written = -math.inf
        self.write("running")

    @property
    def seconds(self) -> float:
        """That training took, all attempts together."""
        return self.before + (datetime.now(UTC) - self._started).total_seconds()

    def progress(self, step: int, loss: float | None, tokens_per_s: float | None) -> None:
        """Called after each step; costs a look at the clock between writes."""
        self.step, self.loss, self.tokens_per_s = step, loss, tokens_per_s
        if self.setup is None:
            self.setup, self.first_step = round(self.seconds - self.before, 3), step
        if time.monotonic() - self._written >= self.every:
            self.write("running")

    def write(self, status: str, reason: str | None = None) -> None:
        """Write now. `reason` is one short line for a status that isn't "finished"."""
        self._written = time.monotonic()
        write_json(
            self.path,
            {
                "status": status,
                "step": self.step,
                "max_steps": self.max_steps,
                "loss": self.loss,
                "tokens_per_s": self.tokens_per_s,
                "reason": reason,
                "started": self._started.isoformat(timespec="seconds"),
                "updated": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(self.seconds, 3),
                "setup": self.setup,
                "trained": round(self.seconds - self.before - (self.setup or 0.0), 3),
                "first_step": self.first_step,
                "pid": os.getpid(),
                "host": platform.node(),
            },
        )


class Unwritten(Status):
    """Of a process beside the one that writes."""

    def write(self, status: str, reason: str | None = None) -> None:
        self._written = time.monotonic()
