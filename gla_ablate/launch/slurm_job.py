"""What a SLURM job runs: one trial's process, which goes on from its last checkpoint when SLURM requeues the job.

Before a job's time is up, or when it is preempted, SLURM sends SIGUSR2 (`submitit` asks for it): the trial is told to
save and end, and the job puts itself back into SLURM's queue. So it does some time after a bare SIGTERM, with which a
preemption or scancel begins. Needs little beyond the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from submitit.helpers import DelayedSubmission

INTERRUPTED = 130  # the trial's exit code after a SIGTERM
HOLD = 300.0  # seconds that a job lasts after one, for SLURM to end or requeue it
NOTE = "job.json"  # in the trial's folder, as long as run.py wants the job
USER = (signal.SIGUSR1, signal.SIGUSR2)


class TrialJob:
    """The trial in `home`, with `slot` in its environment."""

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, home: Path, slot: dict[str, str]) -> None:
        self.home, self.slot = home, slot

    def __call__(self) -> int:
        """Run the trial; its return code. Waits for an earlier process of it that is still ending, on a node that SLURM
        gave up, say."""
        with FileLock(self.home / "trial.lock"):
            pass
        try:
            self.process = self.start()
            code = self.wait()
            if code == INTERRUPTED:
                time.sleep(HOLD)
                self.give_way()
            return code
        except BaseException:  # the job ends, or is requeued
            self.end()
            raise

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
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        number = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")
        if number and (self.home / NOTE).exists():
            subprocess.run(["scontrol", "requeue", number], check=True, timeout=60)
            sys.exit(1)  # without a result, as submitit does after a requeue of its own

    def checkpoint(self) -> DelayedSubmission:
        """What the job runs once it is requeued; `submitit` calls this in the handler of SIGUSR2."""
        self.end()
        return DelayedSubmission(TrialJob(self.home, self.slot))
