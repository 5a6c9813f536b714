"""Real processes killed while they train, again and again, until the grid is done all the same.

`GLA_ABLATE_KILLS` says how many kills there shall be, each at a random moment of training; those of a process that is
only starting don't count. With `-s` the step of each is printed.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gla_ablate.status import read_json
from gla_ablate.trial import is_finished
from tests.test_resume import PLUGIN, outcome

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("GLA_ABLATE_KILLS", "2"))
EXPERIMENT = """
name: grid
base: [model/tiny]
plugins: [drawing.py]
set:
  model: {dim: 32, layers: 1, heads: 2, chunk_size: 16, gate: {name: drawing}}
  data: {name: mqar, seq_len: 16, batch_size: 4, vocab_size: 32, pairs: 3, train_examples: 64, val_tokens: 160}
  trainer: {max_steps: 330, val_every: 40, log_every: 7, precision: 32-true}
seeds: [0, 1]
"""
PAUSE = "pause"  # beside grid.yaml
# how a kill is done: to whom, and with what
WAYS = (
    ("trial", signal.SIGKILL),
    ("run.py", signal.SIGKILL),
    ("all", signal.SIGKILL),
    ("trial", signal.SIGTERM),
    ("run.py", signal.SIGINT),
    ("run.py", signal.SIGTERM),
    ("all", signal.SIGTERM),
    ("server", signal.SIGKILL),
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")


def write_grid(folder: Path) -> Path:
    """`grid.yaml`, and a plugin beside it, of two trials that train for a few seconds."""
    (folder / "drawing.py").write_text(PLUGIN)
    (folder / "grid.yaml").write_text(EXPERIMENT)
    return folder


@pytest.fixture
def grid(tmp_path: Path, scratch_registry: None) -> Path:
    return write_grid(tmp_path)


def start(grid: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command, as the leader of a session, on one core a trial, so that sums come out the same."""
    command = [sys.executable, ROOT / "run.py", grid / "grid.yaml", "--out", out, "--jobs", "2"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def trials(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("grid/*/config.yaml"))


def training(out: Path, since: float) -> dict[Path, dict[str, Any]]:
    """The trials that are training, and have done a step in a process that started after `since`."""
    found = {}
    for folder in trials(out):
        status = read_json(folder / "status.json") or {}
        began = (folder / "status.json").stat().st_mtime > since if status else False
        if status.get("status") == "running" and status["step"] > 0 and began and alive(status["pid"]):
            found[folder] = status
    return found


def paused(grid: Path, process: subprocess.Popen[str]) -> dict[Path, dict[str, Any]]:
    """The two trials of what `process` runs, in `runs`, once both have saved a checkpoint and wait, as `GLA_TEST_PAUSE`
    tells them, for the file that it names to go."""

    def found() -> dict[Path, dict[str, Any]] | None:
        assert process.poll() is None, process.communicate()
        running = training(grid / "runs", 0)
        waiting = [home for home, status in running.items() if (grid / f"{PAUSE}.{status['pid']}").exists()]
        return running if len(waiting) == 2 else None

    return wait_for(found)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


def kill(process: subprocess.Popen[bytes], way: tuple[str, int], running: dict[Path, dict[str, Any]]) -> None:
    whom, number = way
    pids = [status["pid"] for status in running.values()]
    if whom == "trial":
        os.kill(random.choice(pids), number)
        return  # the other goes on, and run.py ends with it
    if whom == "server":  # of which trials are forks; without it run.py ends, too
        os.kill(parent(pids[0]), number)
        process.wait(60)
        wait_for(lambda: not any(map(alive, pids)), 60)
        return
    if whom == "all":
        for pid in pids:
            os.kill(pid, number)
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: not any(map(alive, pids)), 60)  # no orphan runs on


def step_of(folder: Path) -> int:
    """The last in its curves, which are written more often than its status."""
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    return max((int(row.split(",")[0]) for row in rows if row.count(",") == 2), default=0)


def attempts(grid: Path, out: Path, ways: Iterator[tuple[str, int]]) -> Iterator[str]:
    """Run the grid, and kill something of it at a random moment, as long as there are ways left; what was killed at
    which step, until it is done."""
    while True:
        before = {path: path.stat().st_mtime_ns for path in out.glob("grid/*/result.json")}
        since = time.time()
        process = start(grid, out)
        try:
            running = wait_for(lambda since=since, process=process: training(out, since) or process.poll() is not None)
            if isinstance(running, dict):
                time.sleep(random.uniform(0, 1.5))
                running = training(out, since)
            if isinstance(running, dict) and running and (way := next(ways, None)):
                steps = {folder.name.split("-")[-1]: step_of(folder) for folder in running}
                kill(process, way, running)
                yield f"{way[0]} by {signal.Signals(way[1]).name} at {steps}"
            code = process.wait(120)
        finally:
            process.kill()
        assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("grid/*/result.json")}.items()
        if code == 0:
            assert len(trials(out)) == 2 and all(map(is_finished, trials(out)))
            return


@pytest.mark.timeout(120 + 60 * KILLS)
def test_a_grid_killed_again_and_again_ends_as_if_it_had_not_been(grid: Path) -> None:
    seed = random.randrange(10**6)
    random.seed(seed)
    print(f"\nseed {seed}")
    whole = start(grid, grid / "whole")
    assert whole.wait(180) == 0
    want = {folder.name: outcome(folder) for folder in trials(grid / "whole")}
    assert len(want) == 2
    kills, ways = 0, itertools.islice(itertools.cycle(random.sample(WAYS, len(WAYS))), KILLS)
    for i in itertools.count():
        out = grid / f"killed{i}"
        for done in attempts(grid, out, ways):
            kills += 1
            print(f"kill {kills}: {done}", flush=True)
        for folder in trials(out):
            assert outcome(folder) == want[folder.name], folder
        if kills >= KILLS:
            return
