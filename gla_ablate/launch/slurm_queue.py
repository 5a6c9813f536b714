"""The jobs that wait or run: SLURM's own, or processes of submitit's stand-in for it."""

from __future__ import annotations

import getpass
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import submitit

from gla_ablate.launch.local import is_locked
from gla_ablate.launch.state import State

EVERY = 10.0  # seconds between calls of squeue
COMPLETING = "CG"  # squeue's word for a job whose end has begun


class Queue(Protocol):
    def holds(self, job: submitit.Job[int]) -> bool: ...

    def cancel(self, jobs: Mapping[Path, submitit.Job[int]], kill: bool = False) -> set[Path]:
        """End the jobs, each by the folder of its trial, with `kill` at once; those that may go on all the same."""

    def last_state(self, job: submitit.Job[int]) -> str:
        """As the accounting has it, such as "NODE_FAIL"; "" where there is none."""


class SlurmQueue:
    def __init__(self) -> None:
        self.looked = -EVERY
        self.jobs: set[str] | None = None  # None: nothing is known, SLURM's controller is busy or down

    def holds(self, job: submitit.Job[int]) -> bool:
        if time.monotonic() - self.looked >= EVERY:
            command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i %t"]
            listed = output(command)
            self.looked = time.monotonic()
            states = [line.split() for line in (listed or "").splitlines()]
            self.jobs = None if listed is None else {number for number, state in states if state != COMPLETING}
        return self.jobs is None or job.job_id in self.jobs

    def cancel(self, jobs: Mapping[Path, submitit.Job[int]], kill: bool = False) -> set[Path]:
        numbers = ranges(job.job_id for job in jobs.values())
        if not numbers or output(["scancel", *["--signal=KILL"] * kill, *numbers]) is not None:
            return set()
        self.looked = -EVERY  # one of them may only have ended by itself
        return {home for home, job in jobs.items() if self.holds(job)}

    def last_state(self, job: submitit.Job[int]) -> str:
        states = output(["sacct", "--noheader", "--allocations", "--parsable2", "--format", "State", "-j", job.job_id])
        return (states or "").strip().split("\n")[-1]


class LocalQueue:
    """Of processes here, which `folder`, where submitit keeps their files, tells from those of other grids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def holds(self, job: submitit.Job[int]) -> bool:
        try:
            words = Path(f"/proc/{job.job_id}/cmdline").read_bytes().split(b"\0")  # empty of one that has ended
        except OSError:
            return False
        return b"submitit.local._local" in words and os.fsencode(self.folder) in words

    def cancel(self, jobs: Mapping[Path, submitit.Job[int]], kill: bool = False) -> set[Path]:
        for home, job in jobs.items():
            if self.holds(job):
                os.kill(int(job.job_id), signal.SIGINT)  # its task is killed a second later, and the trial told to end
            if kill and (pid := State.read(home).pid) and is_locked(home):  # so that it is still the trial's
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return set()

    def last_state(self, job: submitit.Job[int]) -> str:
        return ""


def ranges(numbers: Iterable[str]) -> list[str]:
    """Those of jobs as scancel takes them, the tasks of an array together: `["7", "8_0", "8_1"]` → `["7", "8_[0-1]"]`.
    For each one of its own scancel would call SLURM's controller."""
    found, tasks = [], list[tuple[str, int]]()
    for number in numbers:
        array, _, task = number.partition("_")
        if task:
            tasks.append((array, int(task)))
        else:
            found.append(number)
    tasks.sort()
    for (array, _), group in itertools.groupby(enumerate(tasks), lambda x: (x[1][0], x[1][1] - x[0])):
        run = [task for _, (_, task) in group]
        found.append(f"{array}_{run[0]}" if len(run) == 1 else f"{array}_[{run[0]}-{run[-1]}]")
    return found


def output(command: list[str]) -> str | None:
    """What a command of SLURM's prints; None where it fails. A Ctrl-C on the terminal doesn't reach it."""
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=60, start_new_session=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
