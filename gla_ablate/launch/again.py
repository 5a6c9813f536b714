"""`python run.py RUN_FOLDER`: one trial from its own folder, without the experiment that it was of.

One that isn't finished goes on in its folder. A finished one runs again in `again1`, `again2`, … inside it, and its
metrics are held against what they were.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from rich.console import Console

from gla_ablate.config import read_config
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch.local import is_locked, prepare, run_trials
from gla_ablate.launch.places import widest
from gla_ablate.launch.processes import starter
from gla_ablate.launch.slots import divide
from gla_ablate.launch.view import make_view
from gla_ablate.stamp import PACKAGES, code_state, installed
from gla_ablate.status import read_json
from gla_ablate.trial import is_finished


def run_again(home: Path, console: Console, max_retries: int = 0) -> int:
    """Run the trial in `home`, up to `max_retries` times more if it is killed; the exit code. Raises `ConfigError` if
    there is none, or none that could run."""
    if not (home / "config.yaml").is_file():
        raise ConfigError(f"{home}: no config.yaml here, so there is no trial to run")
    home = home.resolve()
    stamp = read_json(home / "stamp.json") or {}
    folder = stamp.get("folder")
    there = folder if isinstance(folder, str) and os.path.isdir(folder) else os.curdir
    with chdir(there):  # which paths of the data may be relative to
        return _run_again(home, stamp, console, max_retries)


def _run_again(home: Path, stamp: dict[str, Any], console: Console, max_retries: int) -> int:
    config = read_config(home / "config.yaml")

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    target = home
    if is_locked(target):
        raise ConfigError(f"{home}: another process is running this trial")
    if is_finished(target):
        target = next(new for i in itertools.count(1) if not (new := target / f"again{i}").exists())
        say(f"{home}: finished before, so it runs again in {home / target.name}")
    else:
        say(f"{home}: isn't finished, so it goes on")
    for change in changes(stamp) if stamp else []:
        say(f"not as it was: {change}")
    trial = Trial(target.name, {}, config.seed, config)
    devices = widest([trial])
    slots = divide(1, devices=devices)
    threads = part(stamp, "machine").get("threads")
    if type(threads) is int and 0 < threads < 10_000 and "CUDA_VISIBLE_DEVICES" not in slots[0]:
        slots[0]["OMP_NUM_THREADS"] = str(threads * devices)  # on a CPU other bits come of another number
    todo = prepare([trial], target.parent, retry_failed=True, say=say)
    with make_view(console, todo, 0) as view:
        interrupted = run_trials(todo, target.parent, slots, view, starter(slots), max_retries=max_retries)
    if interrupted:
        return 130
    if not is_finished(target):
        return 1
    if target != home:
        now = read_json(target / "stamp.json") or {}
        for name in ("data", "plugin"):
            if now.get(name) != stamp.get(name):
                say(f"not as it was: {name}: {stamp.get(name)}, now {now.get(name)}")
        compare(read_json(home / "result.json") or {}, read_json(target / "result.json") or {}, say)
    return 0


def changes(stamp: dict[str, Any]) -> list[str]:
    """What is another than in the stamp: the code and the versions."""
    found = []
    before, code = part(stamp, "git"), code_state()
    now = code.state
    if before.get("sha") != now["sha"]:
        found.append(f"git {before.get('sha')}, now {now['sha']}")
    then, kept = before.get("diff") or ("some" if before.get("dirty") else "none"), code.name or "none"
    if then != kept:
        found.append(f"changes that were not committed: {then}, now {kept}")
    versions = part(stamp, "versions")
    found += [f"{name} {versions[name]}, now {installed(name)}" for name in (*PACKAGES, "torch")
              if name in versions and versions[name] != installed(name)]  # fmt: skip
    return found


def compare(before: dict[str, Any], now: dict[str, Any], say: Callable[[str], None]) -> None:
    """The last value of each validation metric, then and now."""
    then, again = part(before, "metrics"), part(now, "metrics")
    for name in sorted(name for name in then.keys() & again.keys() if name.startswith("val/")):
        if not all(type(metrics[name]) in (int, float) for metrics in (then, again)):
            continue
        same = "the same to the last bit" if then[name] == again[name] else f"off by {again[name] - then[name]:.2g}"
        say(f"{name}: {then[name]:.6g} then, {again[name]:.6g} now, {same}")


def part(record: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under `key` of a file that may be damaged."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}
