"""Trials as jobs of SLURM, submitted through submitit: an array, of which so many run at a time.

Jobs belong to SLURM. They wait there, are requeued and go on there when run.py is killed; the same command finds them
again by `job.json` in a trial's folder. When run.py is told to end, they are cancelled, and save first. Here run.py
only watches: the trials' folders, results that submitit leaves under `slurm/`, and every few seconds `squeue`.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from gla_ablate.errors import ConfigError
from gla_ablate.launch.local import is_locked
from gla_ablate.launch.processes import Ended, Process, Start, surroundings
from gla_ablate.launch.slurm_job import NOTE, TrialJob
from gla_ablate.launch.slurm_options import CLUSTER, not_for_jobs
from gla_ablate.launch.slurm_queue import EVERY, LocalQueue, Queue, SlurmQueue
from gla_ablate.launch.state import State
from gla_ablate.status import read_json, write_json

LOOK = 1.0  # seconds between looks at a trial's files
KILLED = 2.0  # seconds from SIGKILL until a process is taken to be gone
GONE = 7  # calls of squeue that don't know a job without a result: NFS may show a new file a minute late
ARRAY = 1000  # trials an array: SLURM's own limit (MaxArraySize) is 1001 where nobody has set it
TIMEOUTS = 1000  # how often a trial may run out of its job's time: each goes on where the last one saved
ELSEWHERE = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED")  # states of a job that is lost for no fault of its own
APART = 1.0  # seconds between jobs that are submitted one by one, so that the others are watched meanwhile
PATIENCE = 60.0  # seconds after sbatch refused one: the controller may be busy, or the user's jobs too many
REFUSALS = 10  # in a row, with no other job under way, after which a trial counts as lost
SKEW = 60.0  # seconds by which the clocks of a cluster may differ
GENERIC = {"time": "timeout_min", "cpus_per_task": "cpus_per_task", "gpus_per_node": "gpus_per_node"}  # to submitit


class StartOnSlurm(Start):
    """Starts trials of the grid in `folder` as jobs with these `options` (`slurm_options`), `count` at a time."""

    waits = True

    def __init__(self, folder: Path, options: dict[str, Any], count: int) -> None:
        os.environ.update(surroundings())  # which jobs inherit
        self.cluster, self.count = options[CLUSTER], count
        self.folder = folder.absolute() / "slurm"
        self.queue: Queue = LocalQueue(self.folder) if self.cluster == "local" else SlurmQueue()
        self.submitted: dict[Path, submitit.Job[int]] = {}  # which nobody has begun to watch
        self.watched: list[OnSlurm] = []
        self.lingering: list[str] = []  # jobs that scancel didn't cancel
        self.refused, self.not_before = 0, -math.inf
        self.foreign = not_for_jobs(os.environ, options)
        self.executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, slurm_max_num_timeout=TIMEOUTS)
        self.executor.update_parameters(
            name=f"gla-{folder.name}",
            slurm_additional_parameters={"requeue": True},
            slurm_srun_args=[f"--cpus-per-task={options['cpus_per_task']}"],  # some versions don't take sbatch's
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

    def submit_all(self, homes: Sequence[Path], slot: dict[str, str]) -> None:
        """As arrays. Where sbatch refuses one, since a user may submit so many jobs only, say, half as large ones; what
        it doesn't take now is for later. Raises `ConfigError` with what sbatch says where no job is under way at all.
        """
        at_once = max(1, self.count - len(self.submitted))  # beside those that an earlier run.py submitted
        arrays = [list(homes[i : i + ARRAY]) for i in range(0, len(homes), ARRAY)][:at_once]
        while arrays:
            array = arrays.pop(0)
            self.executor.update_parameters(slurm_array_parallelism=max(1, at_once * len(array) // len(homes)))
            try:
                self.submit(array, slot)
            except ConfigError:
                if len(array) > 1:
                    arrays[:0] = [array[: len(array) // 2]]
                elif not self.submitted:
                    raise
                else:
                    arrays.clear()
                    self.not_before = time.monotonic() + PATIENCE

    def submit(self, homes: Sequence[Path], slot: dict[str, str]) -> None:
        """As one array. Raises `ConfigError` with what sbatch says where it refuses."""
        calls = [TrialJob(home.absolute(), slot) for home in homes]
        now = time.time()
        with undisturbed() if self.cluster != "local" else nullcontext():  # whose jobs are processes that inherit it
            try:
                with without(self.foreign), redirect_stderr(StringIO()), self.executor.batch():  # it prints sbatch's
                    jobs = [self.executor.submit(call) for call in calls]
            except (FailedJobError, FailedSubmissionError) as error:
                raise ConfigError(f"--launcher slurm: sbatch refused: {' '.join(str(error).split())}") from error
            self.submitted.update(zip(homes, jobs, strict=True))
            for home, job in zip(homes, jobs, strict=True):
                remove_older(job.paths.result_pickle, now - SKEW * (self.cluster != "local"))
                write_json(home / NOTE, {"job": job.job_id, "cluster": self.cluster})

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> OnSlurm | Ended | None:
        if home not in self.submitted:
            outside = self.cluster != "local" and len(self._under_way()) + len(self.submitted) >= self.count
            if outside or time.monotonic() < self.not_before:
                return None
            try:
                self.submit([home], slot)
            except ConfigError as error:
                return self._put_off(str(error))
            self.refused = 0
            if self.cluster != "local":
                self.not_before = time.monotonic() + APART
        process = OnSlurm(self.submitted.pop(home), home, self.queue)
        self.watched = [*self._under_way(), process]
        return process

    def _put_off(self, why: str) -> Ended | None:
        """For some time, unless it has been long and nothing ends that it could wait for."""
        self.not_before = time.monotonic() + PATIENCE
        self.refused = 0 if self._under_way() or self.submitted else self.refused + 1
        return Ended(1, why) if self.refused >= REFUSALS else None

    def _under_way(self) -> list[OnSlurm]:
        return [process for process in self.watched if process.returncode is None]

    def cancel(self) -> None:
        """The jobs of trials that nobody has begun to watch."""
        self._cancel(self.submitted)

    def terminate(self, processes: Sequence[Process]) -> None:
        own = [process for process in processes if isinstance(process, OnSlurm)]
        for process in own:
            process.stopped = True
        self._cancel({process.home: process.job for process in own})

    def kill(self, processes: Sequence[Process]) -> None:
        own = [process for process in processes if isinstance(process, OnSlurm) and process.killed == math.inf]
        for process in own:
            process.killed = time.monotonic()
        self.queue.cancel({process.home: process.job for process in own}, kill=True)

    def _cancel(self, jobs: Mapping[Path, submitit.Job[int]]) -> None:
        """What could not be cancelled keeps its note, by which the same command finds it; else that command submits
        another job, though this one may linger."""
        lingering = self.queue.cancel(jobs)
        self.lingering += [jobs[home].job_id for home in lingering]
        for home in jobs.keys() - lingering:
            (home / NOTE).unlink(missing_ok=True)


class OnSlurm(Process):
    """A trial's job."""

    def __init__(self, job: submitit.Job[int], home: Path, queue: Queue) -> None:
        self.job, self.home, self.queue = job, home, queue
        self.returncode: int | None = None
        self.begun = False
        self.ended_by: str | None = None
        self.again = False
        self.stopped, self.killed = False, math.inf  # when it was
        self._seen = -LOOK
        self._missed, self._asked = 0, -EVERY

    def poll(self) -> int | None:
        if self.returncode is not None or time.monotonic() - self._seen < LOOK:
            return self.returncode
        self._seen = time.monotonic()
        self.begun = self.begun or State.read(self.home).status != "queued"
        if result := self._result():
            outcome, value = result
            if outcome == "success":
                self._ended(value)
            else:
                self._ended(1, f"its job {self.job.job_id} failed: {value.strip().splitlines()[-1]}")
        elif self.stopped:
            killed = time.monotonic() - self.killed > KILLED
            if killed or (State.read(self.home).status != "running" and not is_locked(self.home)):
                self.returncode = 130
        elif self._is_gone():
            state = self.queue.last_state(self.job)
            self.again = state.startswith(ELSEWHERE)
            self._ended(1, f"its job {self.job.job_id} ended without a result{state and f': {state}'}")
        return self.returncode

    def _result(self) -> tuple[str, Any] | None:
        """What submitit has written, once it is there as a whole."""
        try:
            return Plain(BytesIO(self.job.paths.result_pickle.read_bytes())).load()
        except (OSError, EOFError, pickle.UnpicklingError):
            return None

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


class Plain(pickle.Unpickler):
    """Of texts, numbers and what holds them: a folder may be somebody else's, and calls nothing here."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end of it, and don't reach the commands that it calls: else there could be jobs
    of which nobody knows."""
    came: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)  # which commands inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Variables of the environment, in here."""
    taken = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(taken)


def remove_older(path: Path, than: float) -> None:
    """`path`, if it was written before a moment, in seconds since 1970."""
    try:
        if path.stat().st_mtime < than:
            path.unlink()
    except FileNotFoundError:
        pass
