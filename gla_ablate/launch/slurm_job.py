"""What a SLURM job runs: one trial's process, which goes on from its last checkpoint when SLURM requeues the job.

Before a job's time is up, or when it is preempted, SLURM sends SIGUSR2 (`submitit` asks for it): the trial is told to
save and end, and the job puts itself back into SLURM's queue. So it does some time after a bare SIGTERM, with which a
preemption or scancel begins. All of this only as long as `job.json` in the trial's folder names the job: else run.py
has cancelled it, or was killed before it could note it. Needs little beyond the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from submitit.helpers import DelayedSubmission

from gla_ablate.status import read_json

INTERRUPTED = 130  # the trial's exit code after a SIGTERM
HOLD = 300.0  # seconds that a job lasts after one, for SLURM to end or requeue it
NOTE = "job.json"
NOTED = 60.0  # seconds after which a note that is to come has come, over NFS too
USER = (signal.SIGUSR1, signal.SIGUSR2)


class TrialJob:
    """The trial in `home`, with `slot` in its environment."""

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, home: Path, slot: dict[str, str]) -> None:
        self.home, self.slot = home, slot

    def __call__(self) -> int:
        """Run the trial; its return code."""
        deadline = time.monotonic() + NOTED
        while not self.is_wanted():
            if time.monotonic() > deadline:
                return INTERRUPTED
            time.sleep(0.1)
        self.wait_for_another()
        try:
            self.process = self.start()
            code = self.wait()
            if code in (INTERRUPTED, -signal.SIGTERM):  # that is before it listens
                time.sleep(HOLD)
                self.give_way()
            return code
        except BaseException:  # the job ends, or is requeued
            self.end()
            raise

    def wait_for_another(self) -> None:
        """For an earlier process of the trial that is still ending, on a node that SLURM gave up, say."""
        with suppress(Timeout), FileLock(self.home / "trial.lock", timeout=1.0):
            return
        with open(self.home / "log.txt", "a", encoding="utf-8") as log:
            print("waiting for another process of this trial to end", file=log)
        with FileLock(self.home / "trial.lock"):
            pass

    def start(self) -> subprocess.Popen[bytes]:
        # SLURM's signals go to all processes of a job, and SIGUSR2 would end one that doesn't know it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, USER)
        try:
            with open(self.home / "log.txt", "ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "gla_ablate.trial", str(self.home)],
                    env={**os.environ, **self.slot, "GLA_ABLATE_PARENT": str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait(self) -> int:
        """The return code of the process, once it has ended."""
        assert self.process is not None
        with suppress(ChildProcessError):  # is there no more
            # `Popen.wait` holds a lock that a signal's handler, which waits as well, would wait for forever
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return self.process.wait()

    def end(self) -> None:
        """Let the trial save, and wait until it has."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def give_way(self) -> None:
        """Go back into the queue, where SLURM lets a job that it preempts hold its node for longer than `HOLD`."""
        if "SLURM_JOB_ID" in os.environ and self.is_wanted():
            subprocess.run(["scontrol", "requeue", own_number()], check=True, timeout=60)
            sys.exit(1)  # without a result, as submitit does after a requeue of its own

    def is_wanted(self) -> bool:
        return (read_json(self.home / NOTE) or {}).get("job") == own_number()

    def checkpoint(self) -> DelayedSubmission | None:
        """What the job runs once it is requeued, if it is to be; `submitit` calls this in the handler of SIGUSR2."""
        self.end()
        return DelayedSubmission(TrialJob(self.home, self.slot)) if self.is_wanted() else None


def own_number() -> str:
    """As run.py knows the job that this process is of."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID") or os.environ["SUBMITIT_LOCAL_JOB_ID"]
