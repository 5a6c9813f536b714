"""The jobs that wait or run: SLURM's own, or processes of submitit's stand-in for it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import submitit

from gla_ablate.launch.local import is_locked
from gla_ablate.launch.state import State

EVERY = 10.0  # seconds between calls of squeue, and of sacct for one array
LONGEST = 60.0  # seconds that a command of SLURM's may take
COMPLETING = "CG"  # squeue's word for a job that ends, or that ends there and has been put back into the queue


class Queue(Protocol):
    def holds(self, job: submitit.Job[int]) -> bool: ...

    def cancel(self, jobs: Mapping[Path, submitit.Job[int]], kill: bool = False) -> set[Path]:
        """End the jobs, each by the folder of its trial, with `kill` at once; those that may go on all the same."""

    def last_state(self, job: submitit.Job[int]) -> str:
        """As the accounting has it, such as "NODE_FAIL"; "" where there is none."""


class SlurmQueue:
    def __init__(self) -> None:
        self.looked = -EVERY
        self.looking: Command | None = None
        self.jobs: dict[str, str] | None = None  # number → state; None: SLURM's controller is busy or down
        self.accounts: dict[str, tuple[float, dict[str, str]]] = {}  # array → when it was looked at, number → state

    def holds(self, job: submitit.Job[int]) -> bool:
        """As far as is known: squeue works beside what calls this, but for the first time."""
        if self.looking is None and time.monotonic() - self.looked >= EVERY:
            self.look()
        if self.looking is not None:
            self.see(wait=self.looked == -EVERY)
        return self.jobs is None or job.job_id in self.jobs

    def look(self) -> None:
        self.looking = Command("squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i %t")

    def see(self, wait: bool) -> None:
        """What squeue has found, if it has."""
        assert self.looking is not None
        if self.looking.is_done(wait):
            lines = self.looking.printed
            self.jobs = None if lines is None else dict(line.split() for line in lines.splitlines())
            self.looked, self.looking = time.monotonic(), None

    def cancel(self, jobs: Mapping[Path, submitit.Job[int]], kill: bool = False) -> set[Path]:
        numbers = ranges(job.job_id for job in jobs.values())
        if not numbers or output("scancel", *["--signal=KILL"] * kill, *numbers) is not None:
            return set()
        self.look()  # one of them may only have ended by itself
        self.see(wait=True)
        known = self.jobs
        return {home for home, job in jobs.items() if known is None or known.get(job.job_id, COMPLETING) != COMPLETING}

    def last_state(self, job: submitit.Job[int]) -> str:
        array = job.job_id.partition("_")[0]
        asked, states = self.accounts.get(array, (-EVERY, {}))
        if time.monotonic() - asked >= EVERY:
            given = ("--noheader", "--allocations", "--parsable2", "--format", "JobID,State", "-j", array)
            lines = (output("sacct", *given) or "").splitlines()
            states = {number: state for number, _, state in (line.partition("|") for line in lines)}
            self.accounts[array] = time.monotonic(), states
        return states.get(job.job_id, "")


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


class Command:
    """One of SLURM's, while it works. A Ctrl-C on the terminal doesn't reach it, nor do the user's settings for it."""

    def __init__(self, *words: str) -> None:
        own = {name: x for name, x in os.environ.items() if not name.startswith(("SQUEUE_", "SCANCEL_", "SACCT_"))}
        self.deadline = time.monotonic() + LONGEST
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe would have to be read while it works
        self.printed: str | None = None  # once it is done; None where it failed
        self.process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=self.file, stderr=subprocess.DEVNULL, env=own,
                start_new_session=True,
            )  # fmt: skip

    def is_done(self, wait: bool) -> bool:
        if self.process is None:
            return True
        if wait:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(max(self.deadline - time.monotonic(), 0.0))
        if self.process.poll() is None:
            if time.monotonic() < self.deadline:
                return False
            self.process.kill()
            self.process.wait()
        if self.process.returncode == 0:
            self.file.seek(0)
            self.printed = self.file.read()
        return True


def output(*words: str) -> str | None:
    """What a command of SLURM's prints; None where it fails."""
    command = Command(*words)
    command.is_done(wait=True)
    return command.printed
