"""Trials as jobs of SLURM, submitted through submitit: an array, of which so many run at a time.

Jobs belong to SLURM. They wait there, are requeued and go on there when run.py is killed; the same command finds them
again by `job.json` in a trial's folder. When run.py is told to end, they are cancelled, and save first. Here run.py
only watches: the trials' folders, results that submitit leaves under `slurm/`, and every few seconds `squeue`.
"""

from __future__ import annotations

import getpass
import math
import os
import pickle
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import IO, Any, Protocol

import submitit

from gla_ablate.errors import ConfigError
from gla_ablate.launch.local import is_locked
from gla_ablate.launch.processes import Start, surroundings
from gla_ablate.launch.slurm_job import TrialJob
from gla_ablate.launch.slurm_options import CLUSTER
from gla_ablate.launch.state import State
from gla_ablate.status import read_json, write_json

LOOK = 1.0  # seconds between looks at a trial's files
EVERY = 10.0  # seconds between calls of squeue
KILLED = 2.0  # seconds from SIGKILL until a process is taken to be gone
GONE = 7  # such calls that don't know a job without a result: NFS may show a new file a minute late
ARRAY = 1000  # trials an array: SLURM's own limit (MaxArraySize) is 1001 where nobody has set it
TIMEOUTS = 1000  # how often a trial may run out of its job's time: each goes on where the last one saved
ELSEWHERE = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED")  # states of a job that is lost for no fault of its own
NOTE = "job.json"
GENERIC = {"time": "timeout_min", "cpus_per_task": "cpus_per_task", "gpus_per_node": "gpus_per_node"}  # to submitit


class Queue(Protocol):
    """Of jobs that wait or run."""

    def holds(self, job: submitit.Job[int]) -> bool: ...

    def cancel(self, job: submitit.Job[int], home: Path, kill: bool = False) -> None: ...

    def last_state(self, job: submitit.Job[int]) -> str: ...


class SlurmQueue:
    def __init__(self) -> None:
        self.looked = -EVERY
        self.jobs: set[str] | None = None  # None: nothing is known, SLURM's controller is busy or down

    def holds(self, job: submitit.Job[int]) -> bool:
        if time.monotonic() - self.looked >= EVERY:
            command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"]
            listed = output(command)
            self.looked = time.monotonic()
            self.jobs = None if listed is None else set(listed.split())
        return self.jobs is None or job.job_id in self.jobs

    def cancel(self, job: submitit.Job[int], home: Path, kill: bool = False) -> None:
        output(["scancel", *(["--signal=KILL"] if kill else []), job.job_id])

    def last_state(self, job: submitit.Job[int]) -> str:
        """As the accounting has it, such as "NODE_FAIL"; "" where there is none."""
        states = output(["sacct", "--noheader", "--allocations", "--parsable2", "--format", "State", "-j", job.job_id])
        return (states or "").strip().split("\n")[-1]


class LocalQueue:
    """Of submitit's stand-in for SLURM, whose jobs are processes here."""

    def holds(self, job: submitit.Job[int]) -> bool:
        try:
            return b"submitit" in Path(f"/proc/{job.job_id}/cmdline").read_bytes()  # empty of one that has ended
        except OSError:
            return False

    def cancel(self, job: submitit.Job[int], home: Path, kill: bool = False) -> None:
        if self.holds(job):
            os.kill(int(job.job_id), signal.SIGINT)  # its task is killed a second later, and the trial told to end
        if kill and (pid := State.read(home).pid) and is_locked(home):  # so that it is still the trial's
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def last_state(self, job: submitit.Job[int]) -> str:
        return ""


class StartOnSlurm(Start):
    """Starts trials of the grid in `folder` as jobs with these `options` (`slurm_options`), `count` at a time."""

    waits = True

    def __init__(self, folder: Path, options: dict[str, Any], count: int) -> None:
        os.environ.update(surroundings())  # which jobs inherit
        self.cluster, self.count = options[CLUSTER], count
        self.folder = folder.absolute() / "slurm"
        self.queue: Queue = LocalQueue() if self.cluster == "local" else SlurmQueue()
        self.submitted: dict[Path, submitit.Job[int]] = {}
        self.executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, slurm_max_num_timeout=TIMEOUTS)
        self.executor.update_parameters(
            name=f"gla-{folder.name}",
            slurm_additional_parameters={"requeue": True},
            **{GENERIC.get(key, f"slurm_{key}"): x for key, x in options.items() if key != CLUSTER},
        )

    def take_up(self, homes: Sequence[Path]) -> list[Path]:
        """Find the jobs of these trials that an earlier run.py submitted and that still wait or run; the trials that
        have none."""
        kind = submitit.LocalJob if self.cluster == "local" else submitit.SlurmJob
        for home in homes:
            note = read_json(home / NOTE) or {}
            number = str(note.get("job"))
            if note.get("cluster") == self.cluster and re.fullmatch(r"[0-9]+(_[0-9]+)?", number):  # which names files
                job: submitit.Job[int] = kind(self.folder, number)
                if self.queue.holds(job):
                    self.submitted[home] = job
        return [home for home in homes if home not in self.submitted]

    def submit(self, homes: Sequence[Path], slot: dict[str, str]) -> None:
        """As arrays. Raises `ConfigError` with what sbatch says where it refuses."""
        arrays = [homes[i : i + ARRAY] for i in range(0, len(homes), ARRAY)]
        for array in arrays:
            self.executor.update_parameters(slurm_array_parallelism=max(1, self.count // len(arrays)))
            calls = [TrialJob(home.absolute(), slot) for home in array]
            try:
                with redirect_stderr(StringIO()), self.executor.batch():  # submitit prints what sbatch does
                    jobs = [self.executor.submit(call) for call in calls]
            except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
                raise ConfigError(f"--launcher slurm: sbatch refused: {' '.join(str(error).split())}") from error
            for home, job in zip(array, jobs, strict=True):
                write_json(home / NOTE, {"job": job.job_id, "cluster": self.cluster})
                self.submitted[home] = job

    def cancel(self) -> None:
        """The jobs of trials that nobody has begun to watch."""
        for home, job in self.submitted.items():
            self.queue.cancel(job, home)

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> OnSlurm:
        if home not in self.submitted:
            self.submit([home], slot)
        return OnSlurm(self.submitted.pop(home), home, self.queue)


class OnSlurm:
    """A trial's job."""

    def __init__(self, job: submitit.Job[int], home: Path, queue: Queue) -> None:
        self.job, self.home, self.queue = job, home, queue
        self.returncode: int | None = None
        self.begun = False
        self.ended_by: str | None = None
        self.again = False
        self._stopped, self._killed = False, math.inf  # when it was
        self._seen = -LOOK
        self._missed, self._asked = 0, -EVERY

    def poll(self) -> int | None:
        if self.returncode is not None or time.monotonic() - self._seen < LOOK:
            return self.returncode
        self._seen = time.monotonic()
        self.begun = self.begun or State.read(self.home).status != "queued"
        result = self.job.paths.result_pickle
        if result.exists():
            outcome, value = pickle.loads(result.read_bytes())
            if outcome == "success":
                self._ended(value)
            else:
                self._ended(1, f"its job {self.job.job_id} failed: {value.strip().splitlines()[-1]}")
        elif self._stopped:
            killed = time.monotonic() - self._killed > KILLED
            if killed or (State.read(self.home).status != "running" and not is_locked(self.home)):
                self._ended(130)
        elif self._is_gone():
            state = self.queue.last_state(self.job)
            self.again = state.startswith(ELSEWHERE)
            self._ended(1, f"its job {self.job.job_id} ended without a result{state and f': {state}'}")
        return self.returncode

    def _is_gone(self) -> bool:
        """Whether the queue has not known the job for some time."""
        if time.monotonic() - self._asked >= EVERY:
            self._asked = time.monotonic()
            self._missed = 0 if self.queue.holds(self.job) else self._missed + 1
        return self._missed >= GONE

    def _ended(self, code: int, by: str | None = None) -> None:
        self.returncode, self.ended_by = code, by
        self.begun = self.begun or code == 0
        (self.home / NOTE).unlink(missing_ok=True)

    def terminate(self) -> None:
        self._stopped = True
        (self.home / NOTE).unlink(missing_ok=True)  # the same command submits another job: this one may linger
        self.queue.cancel(self.job, self.home)

    def kill(self) -> None:
        if self._killed == math.inf:
            self._killed = time.monotonic()
            self.queue.cancel(self.job, self.home, kill=True)


def output(command: list[str]) -> str | None:
    """What a command of SLURM's prints; None where it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
