"""`--status`: a grid as its folder shows it, from another terminal, while it runs or afterwards. Writes nothing."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch.forecast import Forecast
from gla_ablate.launch.local import is_held, outcome
from gla_ablate.launch.slots import divide
from gla_ablate.launch.state import State
from gla_ablate.launch.view import NOT_STARTED, add_progress, clock, progress_table
from gla_ablate.status import FAILED, STATUSES, read_json

HOLDER = "run.holder.json"  # who holds run.lock


def print_status(grid: list[Trial], folder: Path, console: Console) -> None:
    """A row per trial of `grid`, why those failed that did, and who is at work in `folder`.

    Raises `ConfigError` if nothing has ever run there.
    """
    if not folder.is_dir():
        raise ConfigError(f"--status: {folder}: nothing has run here yet")
    holder = read_json(folder / HOLDER) or {}
    at_work = bool(holder) and is_alive(holder.get("process"), holder.get("on"), folder / "run.lock")
    states = {trial.id: state_of(folder / trial.id, trial.config.trainer.max_steps) for trial in grid}
    if not at_work:
        for id, state in states.items():
            if not (folder / id / "status.json").exists():  # one that is there may wait in SLURM's queue, say
                state.status = NOT_STARTED
    slots = holder.get("slots")
    at_once = min(slots, len(grid)) if isinstance(slots, int) and slots > 0 else len(divide(None))
    forecast = Forecast(grid, at_once)
    table = progress_table(console.width)
    for id, state in states.items():
        add_progress(table, id, state, forecast.of_trial(state))
    console.print(table)
    for id, state in states.items():
        if state.status in FAILED:
            console.print(f"{state.status}: {id}: {state.reason}", highlight=False, markup=False, soft_wrap=True)
    count = Counter(state.status for state in states.values())
    parts = [f"{count[status]} {status}" for status in (NOT_STARTED, *STATUSES) if count[status]]
    left = forecast.of_grid(states) if at_work else None
    parts += [f"about {clock(left)} left"] if left else []
    console.print(f"{len(grid)} trials: {', '.join(parts)}", highlight=False)
    others = not_of(grid, folder)
    if others:
        console.print(f"{len(others)} more here are not of this grid as it is now", highlight=False)
    at = f"run.py is at work here{who(holder)}" if at_work else "no run.py is at work here"
    console.print(at, highlight=False, markup=False)


def who(holder: dict[str, Any]) -> str:
    """Of `run.holder.json`, in brackets; nothing if it says nothing."""
    words = " ".join(f"{name} {holder[name]}" for name in ("process", "on", "since") if name in holder)
    return words and f" ({words})"


def not_of(grid: list[Trial], folder: Path) -> list[str]:
    """The trials in `folder` that are not of `grid`, of an earlier state of its YAML, say."""
    ids = {trial.id for trial in grid}
    return sorted(h.name for h in folder.iterdir() if h.name not in ids and (h / "config.yaml").is_file())


def state_of(home: Path, max_steps: int) -> State:
    """As `status.json` has it, but for a process that is gone without having said so."""
    state = State.read(home)
    state.status = outcome(home)
    state.max_steps = state.max_steps or max_steps
    if state.status == "running" and not is_alive(state.pid, state.host, home / "trial.lock"):
        state.status, state.reason = "killed", f"its process {state.pid} is gone"
    return state


def is_alive(pid: object, host: object, lock: Path) -> bool:
    """Whether that process is there, which holds `lock` as long as it is; of another machine's nothing is known, so
    yes. Its id alone may be another process's by now, and counts where the lock can't be looked at."""
    if host not in (None, platform.node()):
        return True
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return is_held(lock) is not False
