"""Trials as processes, so many at a time, each on its slot's GPU and threads; where, is for `Start` to say."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from gla_ablate import curves
from gla_ablate.config import write_config
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch.processes import Process, Start, wake
from gla_ablate.launch.state import State
from gla_ablate.launch.view import View
from gla_ablate.status import FAILED, LOST, STATUSES, read_json, set_aside
from gla_ablate.trial import DISK_FULL, is_finished

POLL = 0.1  # seconds between looks at the processes
GRACE = 30.0  # seconds from SIGTERM to SIGKILL: a trial may be writing a checkpoint
SHOWN = 5  # lines of the log of a trial that failed
# How a line of the log begins that says nothing of an end, though it may be the last one: a warning, of Python's (of
# Lightning's own without a category) or torch's, or a hint.
ASIDE = re.compile(
    r"(/.*|\S+)\.py:\d+: |(<.*>|\S+):\d+: \w*Warning: |(DEBUG|INFO|WARNING)\b|(\[rank\d+\]:)?\[?[IW]\d{3,4} |💡"
)
LOSSES = 3  # how often a trial starts again whose node was lost, say, without a step further than before


@dataclass
class Running:
    trial: Trial
    process: Process
    slot: dict[str, str]
    log_from: int  # bytes of log.txt that are of earlier attempts
    shown: bool = False  # as started


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
        wake()  # a start may wait for a server that somebody has stopped

    before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def none_alone(running: list[Running], start: Start) -> Iterator[None]:
    """An error in here ends the trials, which would go on without anybody looking."""
    try:
        yield
    except BaseException:
        start.terminate([r.process for r in running])
        raise


def prepare(
    trials: list[Trial], folder: Path, retry_failed: bool = False, say: Callable[[str], None] = print
) -> list[Trial]:
    """Make the folders of `trials` under `folder`, and return those that have to run. A finished one isn't touched, nor
    one that failed by a fault of its own, but for `retry_failed`; what is damaged is set aside, and said."""
    left = ("finished",) if retry_failed else ("finished", *set(FAILED) - set(LOST))
    todo = []
    for trial in trials:
        home = folder / trial.id
        stands = outcome(home)
        damaged = stands == "finished" and not curves.are_whole(home / "metrics.csv", read_json(home / "result.json"))
        if stands in left and not damaged:
            continue
        if home.is_symlink():
            raise ConfigError(f"{home}: is a symbolic link, and nothing is written where one leads")
        home.mkdir(parents=True, exist_ok=True)
        if damaged:
            # it isn't finished any more
            aside = [set_aside(home / name) for name in ("metrics.csv", "result.json") if (home / name).exists()]
            say(f"{aside[0]}: damaged, so set aside; the trial runs again")
        status, result = read_json(home / "status.json") or {}, read_json(home / "result.json") or {}
        sound = {
            "status.json": status.get("status") in STATUSES,
            "result.json": isinstance(result.get("metrics"), dict),
        }
        for name, is_sound in sound.items():
            if (home / name).exists() and not is_sound:
                say(f"{set_aside(home / name)}: damaged, so set aside; the trial runs again")
        write_config(trial.config, home / "config.yaml")
        with suppress(Timeout), FileLock(own(home / "trial.lock"), timeout=0):  # else it still runs, and says so itself
            if outcome(home) in left:  # a job of SLURM's has ended meanwhile
                continue
            State(max_steps=trial.config.trainer.max_steps).write(home)
        todo.append(trial)
    return todo


def own(path: Path) -> Path:
    """`path`, which is no link to a file elsewhere any more, and no folder."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        set_aside(path)
    return path


def outcome(home: Path) -> str:
    """How the trial in `home` stands: the status, which is "finished" only with a result."""
    status = State.read(home).status
    return "interrupted" if status == "finished" and not is_finished(home) else status


def run_trials(
    todo: list[Trial], folder: Path, slots: list[dict[str, str]], view: View, start: Start,
    *, max_retries: int = 0, fail_fast: bool = False,
) -> bool:  # fmt: skip
    """Run the prepared trials, as many at a time as there are slots, each in the process that `start` gives it, and
    keep `view` informed.

    A trial that fails doesn't disturb the others; with `fail_fast` it ends them, as a signal does. One that was killed
    runs again, up to `max_retries` times; one that was lost with its node, up to `LOSSES` times in a row. SIGINT or
    SIGTERM interrupts the running ones and starts no more. Returns whether it came to that; how each trial ended stands
    in its folder.
    """
    queue, free, running = deque(todo), list(slots), list[Running]()
    retries = dict.fromkeys((trial.id for trial in todo), max_retries)
    losses, reached = dict.fromkeys(retries, LOSSES), dict.fromkeys(retries, 0)
    failed, deadline = False, float("inf")
    with stop_on_signals() as stop, none_alone(running, start):
        while running or (queue and not (stop or failed)):
            for _ in range(min(len(free), len(queue)) if not (stop or failed) else 0):
                if stop:
                    break
                trial = queue.popleft()
                if not start.waits and is_locked(folder / trial.id):  # an earlier process of it is still ending
                    queue.append(trial)
                    continue
                begun = _start(trial, folder / trial.id, free[0], start)
                if begun is None:
                    queue.appendleft(trial)
                    break
                free.pop(0)
                running.append(begun)
            finished = [r for r in running if r.process.poll() is not None]
            for r in running:
                if r.process.begun and not r.shown:
                    r.shown = True
                    view.started(r.trial)
            for ended in finished:
                running.remove(ended)
                free.append(ended.slot)
                home = folder / ended.trial.id
                state = _final_state(home, ended, bool(stop) or failed)
                shown = SHOWN if state.status in FAILED and not ended.process.again else 0
                log = last_lines(home / "log.txt", shown, ended.log_from)
                view.ended(ended.trial, state, log)
                left = losses if ended.process.again else retries
                if ended.process.again and state.step > reached[ended.trial.id]:
                    reached[ended.trial.id], losses[ended.trial.id] = state.step, LOSSES
                if state.status == "killed" and left[ended.trial.id] and not (stop or failed):
                    left[ended.trial.id] -= 1
                    with suppress(OSError):
                        State(step=state.step, max_steps=state.max_steps).write(home)
                    queue.append(ended.trial)
                elif state.status in FAILED:
                    failed = failed or fail_fast
            if (stop or failed) and deadline == float("inf"):
                view.stopping(sum(r.process.begun for r in running))
                start.terminate([r.process for r in running])
                deadline = time.monotonic() + GRACE
                running[:] = [r for r in running if r.process.begun]
            if stop.count + failed > 1 or time.monotonic() > deadline:
                start.kill([r.process for r in running])
            view.tick({r.trial.id: State.read(folder / r.trial.id) for r in running if r.shown})
            time.sleep(POLL)
        return bool(stop)


def _start(trial: Trial, home: Path, slot: dict[str, str], start: Start) -> Running | None:
    """The trial in `home` as a process in a session of its own: Ctrl-C reaches the launcher, which tells it on."""
    if not (home / "config.yaml").is_file():  # somebody has cleared up since it was prepared
        home.mkdir(parents=True, exist_ok=True)
        write_config(trial.config, home / "config.yaml")
    if not start.waits and (before := State.read(home)).status != "queued":  # what ended since has said how
        State(step=before.step, max_steps=before.max_steps).write(home)
    with open(own(home / "log.txt"), "ab") as log:
        process = start(home, slot, log)
        return Running(trial, process, slot, log.tell()) if process else None


def is_locked(home: Path) -> bool:
    """Whether a process holds the trial's lock."""
    return is_held(home / "trial.lock") is True


def is_held(lock: Path) -> bool | None:
    """Whether a process holds it; None if that can't be told. Leaves the file as it is, and holds it for a moment."""
    try:
        number = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(number)
    return False


def _final_state(home: Path, ended: Running, stopped: bool) -> State:
    """How the trial in `home` ended. One that left no final status of its own gets it here, with what is known."""
    state, returncode = State.read(home), ended.process.returncode
    assert returncode is not None
    outside = ended.process.ended_by if not stopped else None
    if is_finished(home) or (state.status in ("interrupted", *FAILED) and not outside):
        return state
    if stopped:
        state.status, state.reason = "interrupted", f"at step {state.step}"
    elif outside:
        state.status, state.reason = "killed", outside
    elif returncode < 0:
        name = signal.Signals(-returncode).name
        hint = ", perhaps for want of memory" if -returncode == signal.SIGKILL else ""
        state.status, state.reason = "killed", f"by signal {-returncode} ({name}){hint}"
    elif returncode == DISK_FULL:
        state.status, state.reason = "disk full", f"no space left after step {state.step}"
    else:
        said = last_words(home / "log.txt", ended.log_from)
        state.status, state.reason = "failed", f"exit code {returncode} without a result{said and f': {said}'}"
    with suppress(OSError):  # on a full disk the others go on as far as they can
        state.write(home)
    return state


def last_words(log: Path, start: int) -> str:
    """The last line from byte `start` on, which is mostly why a process ended; nothing where it is `ASIDE`, or the line
    of source under a warning."""
    lines = last_lines(log, 2, start)
    if not lines:
        return "nothing in log.txt"
    above, last = lines if len(lines) > 1 else ("", *lines)
    is_source = last[0].isspace() and ASIDE.match(above)
    return "" if is_source or ASIDE.match(last) else last


def last_lines(log: Path, count: int, start: int = 0) -> list[str]:
    """From byte `start` on, those that have something in them, each of 200 characters at most."""
    if not count:
        return []
    try:
        lines = log.read_bytes()[start:].decode("utf-8", errors="replace").split("\n")
    except OSError:
        return []
    return [line.rstrip()[:200] for line in lines if line.strip()][-count:]
