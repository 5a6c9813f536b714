"""`--status`, over folders as trials leave them."""

import json
import os
import platform
import subprocess
import sys
from contextlib import ExitStack
from io import StringIO

import pytest
from filelock import FileLock
from rich.console import Console

from gla_ablate.config import Config
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch.overview import HOLDER, is_alive, print_status
from gla_ablate.launch.state import State
from gla_ablate.status import write_json

TRIALS = [Trial(f"trial-{i}", {}, i, Config()) for i in range(5)]
HERE = {"pid": os.getpid(), "host": platform.node()}


@pytest.fixture
def gone():
    """A process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def held():
    """The locks that this process holds, as the process does that a trial runs in."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(FileLock(path))


def leave(folder, i, **state):
    home = folder / f"trial-{i}"
    home.mkdir(parents=True)
    State(**{"max_steps": 200} | state).write(home)
    return home


def shown(folder, width=120):
    out = Console(file=StringIO(), width=width)
    print_status(TRIALS, folder, out)
    return [line.rstrip() for line in out.file.getvalue().splitlines() if line.strip()]


def test_every_trial_stands_there_with_what_its_folder_tells(tmp_path, gone, held):
    home = leave(tmp_path, 0, status="finished", step=200, seconds=25.0, setup=5.0, trained=20.0, first_step=1)
    write_json(home / "result.json", {"metrics": {}})
    leave(
        tmp_path, 1, status="running", step=101, loss=1.25, setup=5.0, trained=10.0, seconds=15.0, first_step=1, **HERE
    )
    leave(tmp_path, 2, status="running", step=7, pid=gone, host=platform.node())
    leave(tmp_path, 3, status="diverged", step=3, reason="loss is nan at step 3 [of 9]")
    other = leave(tmp_path, 99, status="finished")
    (other / "config.yaml").touch()
    write_json(tmp_path / HOLDER, {"process": os.getpid(), "on": platform.node(), "since": "today", "slots": 2})
    held(tmp_path / "run.lock")
    held(tmp_path / "trial-1" / "trial.lock")
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    lines = shown(tmp_path)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(" trial-")}
    assert rows["trial-0"] == ["finished", "200/200", "–", "–", "0:25"]
    assert rows["trial-1"] == ["running", "101/200", "1.250", "–", "0:15", "0:09"]
    assert rows["trial-2"][:2] == ["killed", "7/200"] and rows["trial-4"][:2] == ["queued", "0/200"]
    assert lines[-5:] == [
        f"killed: trial-2: its process {gone} is gone",
        "diverged: trial-3: loss is nan at step 3 [of 9]",
        "5 trials: 1 queued, 1 running, 1 finished, 1 diverged, 1 killed, about 0:25 left",
        "1 more here are not of this grid as it is now",
        f"run.py is at work here (process {os.getpid()} on {platform.node()} since today)",
    ]


def test_without_a_run_at_work_nothing_is_left_to_wait_for(tmp_path, gone):
    leave(tmp_path, 1, status="interrupted", step=101, setup=5.0, trained=10.0, first_step=1)
    leave(tmp_path, 2)  # waits in SLURM's queue, say
    (tmp_path / "trial-3").mkdir()
    lines = shown(tmp_path)
    rows = {line.split()[0]: line for line in lines if line.startswith(" trial-")}
    assert ["not started" in rows[f"trial-{i}"] for i in range(5)] == [True, False, False, True, True]
    assert "queued" in rows["trial-2"] and "0/200" in rows["trial-2"]
    assert lines[-2:] == ["5 trials: 3 not started, 1 queued, 1 interrupted", "no run.py is at work here"]
    write_json(tmp_path / HOLDER, {"process": gone, "on": platform.node(), "since": "yesterday"})  # it was killed
    assert shown(tmp_path)[-1] == "no run.py is at work here"


def test_a_finished_trial_without_its_result_isnt_finished(tmp_path):
    leave(tmp_path, 0, status="finished", step=200)
    assert "1 interrupted" in shown(tmp_path)[-2]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing has run here yet"):
        shown(tmp_path / "no")


def test_a_narrow_terminal_cuts_names_and_nothing_else(tmp_path, held):
    held(
        leave(tmp_path, 1, status="running", step=101, loss=1.25, tokens_per_s=20480.6, seconds=15.0, **HERE)
        / "trial.lock"
    )
    row = next(line for line in shown(tmp_path, width=74) if "running" in line)
    assert row.split()[0].endswith("…") or row.split()[0] == "trial-1"
    assert "101/200" in row and "1.250" in row and "20,481" in row and len(row) <= 74


def test_a_process_elsewhere_may_well_be_alive(gone, tmp_path, held):
    lock = tmp_path / "lock"
    held(lock)
    assert is_alive(os.getpid(), platform.node(), lock) and is_alive(os.getpid(), None, lock)
    assert is_alive(gone, "another-machine", lock) and not is_alive(gone, platform.node(), lock)
    for damaged in (None, "1; rm", -1):
        assert not is_alive(damaged, None, lock)


def test_a_process_that_holds_no_lock_is_another_with_the_same_id(tmp_path):
    leave(tmp_path, 1, status="running", step=7, **HERE)
    write_json(tmp_path / HOLDER, {"process": os.getpid(), "on": platform.node()})
    for name in (tmp_path / "run.lock", tmp_path / "trial-1" / "trial.lock"):
        assert "1 killed" in shown(tmp_path)[-2] and shown(tmp_path)[-1] == "no run.py is at work here"
        name.touch()  # as it stays behind
    assert "1 killed" in shown(tmp_path)[-2]
    (tmp_path / "trial-1" / "trial.lock").unlink()
    (tmp_path / "trial-1" / "trial.lock").mkdir()  # which nothing can be told from
    assert "1 running" in shown(tmp_path)[-2]


DAMAGED = [
    "{",
    '{"status": "well"}',
    '{"status": ["running"]}',
    '{"status": "running", "step": "three"}',
    '{"status": "failed", "reason": ["a"]}',
    '{"status": "failed", "host": 3}',
    '{"status": "running", "seconds": Infinity}',
    f'{{"status": "running", "seconds": 1{"0" * 400}}}',
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_are_no_hindrance(tmp_path, text):
    home = leave(tmp_path, 0, status="finished")
    (home / "status.json").write_text(text)
    (tmp_path / HOLDER).write_text(json.dumps([1]))
    assert shown(tmp_path)[-2] == "5 trials: 4 not started, 1 queued"


@pytest.mark.parametrize("slots", [0, -1, True, "many", 10**20, None])
def test_a_damaged_note_of_who_is_at_work_is_no_hindrance(tmp_path, held, slots):
    held(leave(tmp_path, 1, status="running", step=101, setup=5.0, trained=10.0, first_step=1, **HERE) / "trial.lock")
    leave(tmp_path, 2, status="finished", step=300, max_steps=0, setup=1.0, trained=1.0)  # of no steps
    held(tmp_path / "run.lock")
    write_json(tmp_path / HOLDER, {"process": os.getpid(), "on": platform.node(), "since": "[/b]", "slots": slots})
    assert shown(tmp_path)[-1].endswith("since [/b])")
