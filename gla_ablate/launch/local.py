"""Trials as processes on this machine, so many at a time, each on its slot's GPU and threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from gla_ablate.config import write_config
from gla_ablate.experiment import Trial
from gla_ablate.launch.state import State
from gla_ablate.launch.view import View
from gla_ablate.status import read_json, set_aside
from gla_ablate.trial import is_finished

POLL = 0.1  # seconds between looks at the processes
GRACE = 30.0  # seconds from SIGTERM to SIGKILL: a trial may be writing a checkpoint
COMMAND = (sys.executable, "-m", "gla_ablate.trial")
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    slot: dict[str, str]


class Stop:
    """How many times SIGINT or SIGTERM has come: once asks the trials to end, twice ends them."""

    count = 0

    def __bool__(self) -> bool:
        return self.count > 0


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Counts SIGINT and SIGTERM instead of letting them raise in the middle of something."""
    stop = Stop()

    def count(number: int, frame: FrameType | None) -> None:
        stop.count += 1

    before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(trials: list[Trial], folder: Path, say: Callable[[str], None] = print) -> list[Trial]:
    """Make the folders of `trials` under `folder`, and return those that have to run. A finished one isn't touched;
    what is damaged is set aside, and said."""
    todo = [trial for trial in trials if not is_finished(folder / trial.id)]
    for trial in todo:
        home = folder / trial.id
        home.mkdir(parents=True, exist_ok=True)
        for name, key in (("status.json", "status"), ("result.json", "metrics")):
            if (home / name).exists() and key not in (read_json(home / name) or {}):
                say(f"{set_aside(home / name)}: damaged, so set aside; the trial runs again")
        write_config(trial.config, home / "config.yaml")
        State(max_steps=trial.config.trainer.max_steps).write(home)
    return todo


def run_trials(
    todo: list[Trial], folder: Path, slots: list[dict[str, str]], view: View, command: tuple[str, ...] = COMMAND
) -> bool:
    """Run the prepared trials, as many at a time as there are slots, and keep `view` informed.

    A trial that fails doesn't disturb the others. SIGINT or SIGTERM interrupts the running ones and starts no more.
    Returns whether it came to that; how each trial ended stands in its folder.
    """
    queue, free, running = deque(todo), list(slots), list[Running]()
    deadline = float("inf")
    with stop_on_signals() as stop:
        while running or (queue and not stop):
            for _ in range(min(len(free), len(queue)) if not stop else 0):
                trial = queue.popleft()
                if _is_locked(folder / trial.id):  # an earlier launcher was killed and its trial is still ending
                    queue.append(trial)
                    continue
                running.append(Running(trial, _start(folder / trial.id, free[0], command), free.pop(0)))
                view.started(trial)
            for ended in [r for r in running if r.process.poll() is not None]:
                running.remove(ended)
                free.append(ended.slot)
                view.ended(ended.trial, _final_state(folder / ended.trial.id, ended.process.returncode, bool(stop)))
            if stop and deadline == float("inf"):
                deadline = time.monotonic() + GRACE
                for r in running:
                    r.process.terminate()
                view.stopping(len(running))
            if stop.count > 1 or time.monotonic() > deadline:
                for r in running:
                    r.process.kill()
            view.tick({r.trial.id: State.read(folder / r.trial.id) for r in running})
            time.sleep(POLL)
        return bool(stop)


def _start(home: Path, slot: dict[str, str], command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """The trial in `home` as a process in a session of its own: Ctrl-C reaches the launcher, which tells it on."""
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        **slot,
        "PYTHONPATH": os.pathsep.join(paths),  # a checkout that isn't installed works too
        "PYTHONUNBUFFERED": "1",
        "GLA_ABLATE_PARENT": str(os.getpid()),
    }
    with open(home / "log.txt", "ab") as log:
        return subprocess.Popen(
            [*command, str(home)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _is_locked(home: Path) -> bool:
    """Whether a process holds the trial's lock."""
    try:
        with FileLock(home / "trial.lock", timeout=0):
            return False
    except Timeout:
        return True


def _final_state(home: Path, returncode: int, stopped: bool) -> State:
    """How the trial in `home` ended. One that left no final status of its own gets it here, with what is known."""
    state = State.read(home)
    if is_finished(home) or state.status in ("failed", "interrupted"):
        return state
    if stopped:
        state.status, state.reason = "interrupted", f"at step {state.step}"
    elif returncode < 0:
        name = signal.Signals(-returncode).name
        hint = ", perhaps for want of memory" if -returncode == signal.SIGKILL else ""
        state.status, state.reason = "failed", f"killed by signal {-returncode} ({name}){hint}"
    else:
        state.status, state.reason = (
            "failed",
            f"exit code {returncode} without a result: {_last_line(home / 'log.txt')}",
        )
    with suppress(OSError):  # on a full disk the others go on as far as they can
        state.write(home)
    return state


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "nothing in log.txt")
