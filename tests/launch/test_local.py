"""The launcher with small stand-ins for the trial: scripts that behave as trials do, well or badly."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from gla_ablate.config import Config, read_yaml
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch.local import LOSSES, last_words, prepare, run_trials
from gla_ablate.launch.processes import EachAlone, Spawn, Start
from gla_ablate.launch.state import State
from gla_ablate.launch.view import View

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def status(status, **more):
    part = folder / "part"
    part.write_text(json.dumps({"status": status, "max_steps": 9, **more}))
    part.replace(folder / "status.json")
status("running", step=3, loss=1.5)
print("hello from", folder.name)
"""
FINISH = 'status("finished", step=9, loss=1.25); (folder / "result.json").write_text(\'{"metrics": {}}\')\n'
BEHAVIOUR = {
    "good": FINISH,
    "environment": '(folder / "env.json").write_text(json.dumps(dict(os.environ)))\n' + FINISH,
    "raises": 'status("failed", step=3, reason="ValueError: no"); sys.exit(1)\n',
    "crashes": 'sys.exit("it broke")\n',
    "killed": "os.kill(os.getpid(), signal.SIGKILL)\n",
    "mute": "sys.exit(0)\n",
    "warns": 'import warnings; warnings.warn("an old way", DeprecationWarning); sys.exit(3)\n',
    "full": "sys.exit(28)\n",
    "clears": "import shutil; shutil.rmtree(folder.parent / 'good-later')\n" + FINISH,
    "polite": (
        "def stop(*_):\n"
        '    status("interrupted", step=4, reason="by SIGTERM at step 4"); sys.exit(130)\n'
        "signal.signal(signal.SIGTERM, stop)\n"
        '(folder / "ready").touch()\n'
        "time.sleep(60)\n"
    ),
    "unprepared": '(folder / "ready").touch()\ntime.sleep(60)\n',
    "stubborn": 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / "ready").touch()\ntime.sleep(60)\n',
}


class Launcher:
    """Runs named stand-ins, `slots` at a time, and keeps what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"
        self.script = folder / "stand_in.py"
        branches = (f"if folder.name.startswith({name!r}):\n    exec({code!r})\n" for name, code in BEHAVIOUR.items())
        self.script.write_text(PRELUDE + "".join(branches))
        self.console = Console(file=StringIO(), width=200)

    def __call__(
        self,
        *names: str,
        slots: list[dict[str, str]] | int = 2,
        retry_failed: bool = False,
        start: Start | None = None,
        **options: Any,
    ) -> bool:
        trials = [Trial(name, {}, seed, Config(seed=seed)) for seed, name in enumerate(names)]
        todo = prepare(trials, self.folder, retry_failed)
        self.ran = [trial.id for trial in todo]
        slots = [{}] * slots if isinstance(slots, int) else slots
        with View(self.console, todo, len(trials) - len(todo)) as view:
            start = start or Spawn((sys.executable, str(self.script)))
            return run_trials(todo, self.folder, slots, view, start, **options)

    def state(self, name: str) -> State:
        return State.read(self.folder / name)

    @property
    def printed(self) -> str:
        return self.console.file.getvalue()


@pytest.fixture
def launch(tmp_path):
    return Launcher(tmp_path)


@pytest.fixture
def signals(launch):
    """Sends this process signals, one as soon as every named trial is ready and the rest shortly after."""
    threads = []

    def send(*numbers: int, once_ready: list[str]) -> None:
        def wait_and_send() -> None:
            while not all((launch.folder / name / "ready").exists() for name in once_ready):
                time.sleep(0.02)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.3)

        threads.append(threading.Thread(target=wait_and_send, daemon=True))
        threads[-1].start()

    yield send
    for thread in threads:
        thread.join(5)


def test_each_trial_gets_its_folder_its_config_and_its_log(launch):
    assert launch("good-a", "good-b", "good-c") is False
    for seed, name in enumerate(("good-a", "good-b", "good-c")):
        assert launch.state(name).status == "finished"
        assert read_yaml(launch.folder / name / "config.yaml")["seed"] == seed
        assert (launch.folder / name / "log.txt").read_text() == f"hello from {name}\n"
    assert "3 of 3 finished" in launch.printed


def test_an_error_of_the_launchers_own_ends_the_trials(launch, monkeypatch):
    def tick(self: View, running: dict[str, State]) -> None:
        if (launch.folder / "polite-a" / "ready").exists():
            raise OSError("no terminal any more")

    monkeypatch.setattr(View, "tick", tick)
    with pytest.raises(OSError, match="no terminal"):
        launch("polite-a")
    deadline = time.monotonic() + 10
    while launch.state("polite-a").status != "interrupted":
        assert time.monotonic() < deadline, "it runs on"
        time.sleep(0.02)


def test_a_finished_trial_is_skipped_with_its_files_untouched(launch):
    launch("good")
    before = {f: f.stat().st_mtime_ns for f in (launch.folder / "good").iterdir()}
    launch("good", "good-too")
    assert launch.ran == ["good-too"]
    assert {f: f.stat().st_mtime_ns for f in (launch.folder / "good").iterdir()} == before


@pytest.mark.parametrize("name", ["status.json", "result.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"status": "odd", "metrics": 5}', "[" * 100_000])
def test_what_is_damaged_is_set_aside_and_the_trial_runs_again(launch, capsys, name, content):
    launch("good")
    (launch.folder / "good" / name).write_text(content)
    launch("good")
    assert launch.ran == ["good"] and launch.state("good").status == "finished"
    aside = launch.folder / "good" / f"{name}.damaged"
    assert aside.read_text() == content
    assert capsys.readouterr().out == f"{aside}: damaged, so set aside; the trial runs again\n"
    launch("good")
    assert launch.ran == []


@pytest.mark.parametrize(
    "content", [b"\0" * 40, b"\n", b"step,metric,value\n1,val/loss\n", b"step,metric,value\n\xff,a,1\n"]
)
def test_a_finished_trial_whose_curves_are_damaged_runs_again(launch, capsys, content):
    launch("good")
    curves = launch.folder / "good" / "metrics.csv"
    curves.write_bytes(b"step,metric,value\n1,val/loss,nan\n2,val/")  # as a report may find it, and takes it
    launch("good")
    assert launch.ran == []
    curves.write_bytes(content)
    launch("good")
    assert launch.ran == ["good"] and launch.state("good").status == "finished"
    assert curves.with_name("metrics.csv.damaged").read_bytes() == content
    assert f"{curves}.damaged: damaged, so set aside; the trial runs again" in capsys.readouterr().out


LOGGED = "step,metric,value\n1,val/loss,3.0\n2,val/loss,2.5\n"


@pytest.mark.parametrize("left", ["step,metric,value\n1,val/loss,3.0\n", LOGGED[:-5], "", None], ids=str)
def test_a_finished_trial_whose_curves_were_cut_short_runs_again(launch, capsys, left):
    launch("good")
    home = launch.folder / "good"
    (home / "result.json").write_text('{"metrics": {"val/loss": 2.5, "val/odd": NaN}, "steps": 2}')
    (home / "metrics.csv").write_text(LOGGED + "2,val/odd,nan\n")
    launch("good")
    assert launch.ran == []
    (home / "metrics.csv").unlink()
    if left is not None:
        (home / "metrics.csv").write_text(left)
    launch("good")
    assert launch.ran == ["good"] and launch.state("good").status == "finished"
    aside = home / ("result.json.damaged" if left is None else "metrics.csv.damaged")
    assert aside.exists() and f"{aside}: damaged, so set aside; the trial runs again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("raises", "failed", "ValueError: no"),
        ("crashes", "failed", "exit code 1 without a result: it broke"),
        ("killed", "killed", "by signal 9 (SIGKILL), perhaps for want of memory"),
        ("full", "disk full", "no space left after step 3"),
        ("mute", "failed", "exit code 0 without a result: hello from mute"),
        ("warns", "failed", "exit code 3 without a result"),
    ],
)
def test_a_trial_that_fails_is_marked_with_its_reason_and_the_others_go_on(launch, name, kind, reason):
    launch(name, "good", slots=1)
    assert (launch.state(name).status, launch.state(name).reason, launch.state(name).step) == (kind, reason, 3)
    assert launch.state("good").status == "finished"
    assert f"{name}: {reason}" in launch.printed
    assert f"\n    hello from {name}\n" in launch.printed  # the end of its log
    launch(name, "good")
    assert launch.ran == ([name] if kind in ("killed", "disk full") else [])  # not by its own fault
    launch(name, "good", retry_failed=True)
    assert launch.ran == [name]


PYTREE = "/a folder/lightning/pytorch/utilities/_pytree.py:21: isinstance(treespec, LeafSpec) is deprecated, use …"


@pytest.mark.parametrize(
    "aside",
    [
        PYTREE,  # as Lightning writes its own
        "/lib/torch/nn/module.py:12: UserWarning: an old way\n  return F.linear(x)",
        "sys:1: ResourceWarning: unclosed file",
        "<frozen importlib._bootstrap>:241: DeprecationWarning: builtin type has no __module__",
        "INFO: GPU available: True (cuda), used: True",
        "WARNING:root:an old way",
        "💡 Tip: For seamless cloud uploads",
        "[rank0]:[W803 12:00:00.123 ProcessGroupNCCL.cpp:1496] Warning: destroy_process_group() was not called",
        "W0803 12:00:00.123000 7 torch/_dynamo/convert_frame.py:844] hit the recompile limit",
    ],
    ids=lambda aside: aside[:20],
)
def test_a_warning_at_the_end_of_a_log_is_no_reason(tmp_path, aside):
    log = tmp_path / "log.txt"
    log.write_text(f"step 3/9\n{aside}\n\n", encoding="utf-8")
    assert last_words(log, 0) == ""
    for said in ("it broke", "ValueError: model.py:12: no such layer", "    ~~~~^^^", "Information: none", "I stop"):
        log.write_text(f"{aside}\nin between\n{said}\n", encoding="utf-8")
        assert last_words(log, 0) == said
    assert last_words(log, log.stat().st_size) == "nothing in log.txt"


def test_a_trial_that_was_killed_starts_again_as_often_as_it_may(launch):
    launch("killed", "raises", max_retries=2)
    assert launch.printed.count("started      killed") == 3 and launch.printed.count("started      raises") == 1
    assert (launch.folder / "killed" / "log.txt").read_text() == "hello from killed\n" * 3
    assert launch.state("killed").status == "killed"


def test_a_folder_that_was_cleared_away_before_its_turn_is_made_again(launch):
    launch("clears", "good-later", slots=1)
    assert launch.state("good-later").status == "finished"


def test_nothing_is_written_where_a_link_leads(launch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    launch.folder.mkdir()
    (launch.folder / "good").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        launch("good")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_nor_are_damaged_curves_put_aside_there(launch, tmp_path):
    launch("good")
    theirs = (launch.folder / "good").rename(tmp_path / "theirs")
    (launch.folder / "good").symlink_to(theirs)
    (theirs / "metrics.csv").write_bytes(b"\n")
    before = sorted(theirs.iterdir())
    with pytest.raises(ConfigError, match="symbolic link"):
        launch("good")
    assert sorted(theirs.iterdir()) == before


def test_what_stands_in_place_of_a_trial_s_own_files_is_put_aside(launch, tmp_path):
    home = launch.folder / "good"
    for name in ("log.txt", "trial.lock", "config.yaml", "status.json"):
        (home / name / "kept").mkdir(parents=True)
    launch("good")
    assert launch.state("good").status == "finished" and len(list(home.glob("*.damaged/kept"))) == 4
    for name in ("log.txt", "trial.lock"):
        (launch.folder / "good-linked").mkdir(exist_ok=True)
        (launch.folder / "good-linked" / name).symlink_to(tmp_path / "elsewhere")
    launch("good-linked")
    assert launch.state("good-linked").status == "finished" and not (tmp_path / "elsewhere").exists()


def test_a_grid_that_is_to_fail_fast_ends_with_the_first_failure(launch):
    began = time.monotonic()
    assert launch("polite", "raises", "good", fail_fast=True) is False
    assert time.monotonic() - began < 30
    statuses = {name: launch.state(name).status for name in ("polite", "raises", "good")}
    assert statuses == {"polite": "interrupted", "raises": "failed", "good": "queued"}
    assert "stopping 1 running trial; Ctrl-C to kill it\n" in launch.printed
    launch("good-2", "raises", "good")
    assert launch.ran == ["good-2", "good"]


def test_a_grid_whose_only_running_trial_has_failed_has_nothing_to_stop(launch):
    launch("raises", "good", slots=1, fail_fast=True)
    assert launch.state("good").status == "queued" and "stopping" not in launch.printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_what_runs_and_starts_no_more(launch, signals, number):
    signals(number, once_ready=["polite", "unprepared"])
    assert launch("polite", "unprepared", "good") is True
    assert (launch.state("polite").status, launch.state("polite").reason) == ("interrupted", "by SIGTERM at step 4")
    assert (launch.state("unprepared").status, launch.state("unprepared").reason) == ("interrupted", "at step 3")
    assert launch.state("good").status == "queued"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_kills_a_trial_that_does_not_listen(launch, signals):
    signals(signal.SIGINT, signal.SIGINT, once_ready=["stubborn"])
    began = time.monotonic()
    assert launch("stubborn") is True
    assert time.monotonic() - began < 20
    assert launch.state("stubborn").status == "interrupted"


def test_a_trial_that_does_not_listen_is_killed_after_the_grace(launch, signals, monkeypatch):
    monkeypatch.setattr("gla_ablate.launch.local.GRACE", 0.5)
    signals(signal.SIGINT, once_ready=["stubborn"])
    assert launch("stubborn") is True
    assert launch.state("stubborn").status == "interrupted"


def test_a_trial_that_another_process_still_holds_is_waited_for(launch):
    (launch.folder / "good").mkdir(parents=True)
    lock = FileLock(launch.folder / "good" / "trial.lock", thread_local=False)
    lock.acquire()
    seen = []
    timer = threading.Timer(0.5, lambda: (seen.append((launch.folder / "good" / "log.txt").exists()), lock.release()))
    timer.start()
    launch("good")
    assert seen == [False]
    assert launch.state("good").status == "finished"


def test_a_trial_has_the_environment_of_its_slot_and_knows_its_parent(launch):
    launch("environment", slots=[{"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "7"}])
    env = json.loads((launch.folder / "environment" / "env.json").read_text())
    assert (env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]) == ("3", "7")
    assert env["GLA_ABLATE_PARENT"] == str(os.getpid())
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(Path(__file__).parents[2])


def test_a_trial_that_ends_while_its_folder_is_prepared_is_left_as_it_ended(launch, monkeypatch):
    """A job of SLURM's runs on while no run.py does."""
    assert launch("good-a") is False
    finished = (launch.folder / "good-a" / "status.json").read_text()
    State("running", step=3, max_steps=9).write(launch.folder / "good-a")

    def write_config(config: Config, path: Path) -> None:
        (launch.folder / "good-a" / "status.json").write_text(finished)

    monkeypatch.setattr("gla_ablate.launch.local.write_config", write_config)
    launch("good-a")
    assert launch.ran == [] and launch.state("good-a").status == "finished"


class Elsewhere:
    """A process of another machine's: it waits for a place, and is lost once it has one that isn't to be had."""

    def __init__(self, home: Path, gets_a_place: bool, step: int) -> None:
        self.home, self.gets_a_place, self.step = home, gets_a_place, step
        self.returncode, self.begun, self.ended_by, self.again = None, False, None, False
        (home / "ready").touch()

    def poll(self) -> int | None:
        if self.begun:
            self.returncode, self.ended_by, self.again = -9, "its node was lost", True
        elif self.gets_a_place:
            self.begun = True
            State("interrupted", step=self.step, max_steps=9).write(self.home)  # as its end is told there
        return self.returncode

    def terminate(self) -> None:
        self.taken_back = True

    kill = terminate


class StartElsewhere(EachAlone):
    waits = False

    def __init__(self, gets_a_place: bool = True, steps: Iterable[int] = itertools.repeat(3)) -> None:
        self.gets_a_place, self.steps, self.started, self.asked = gets_a_place, iter(steps), [], 0

    def __call__(self, home: Path, slot: dict[str, str], log: Any) -> Elsewhere | None:
        self.asked += 1
        if self.asked % 2:
            return None  # not now
        self.started.append(Elsewhere(home, self.gets_a_place, next(self.steps)))
        return self.started[-1]


def test_a_lost_trial_starts_again_so_many_times_beside_those_that_were_killed(launch):
    start = StartElsewhere()
    assert launch("lost", start=start, max_retries=0) is False
    assert len(start.started) == 1 + LOSSES and launch.printed.count("started      lost") == 1 + LOSSES
    assert (launch.state("lost").status, launch.state("lost").reason) == ("killed", "its node was lost")
    assert launch.state("lost").step == 3


def test_a_lost_trial_that_came_further_starts_again_as_often_as_before(launch):
    start = StartElsewhere(steps=[2, 2, 2, 7, 7, 7, 7])
    assert launch("lost", start=start) is False
    assert len(start.started) == 7 and launch.state("lost").step == 7


def test_a_trial_that_waits_for_a_place_is_not_shown_as_started_and_is_taken_back(launch, signals):
    start = StartElsewhere(gets_a_place=False)
    signals(signal.SIGTERM, once_ready=["a", "b"])
    assert launch("a", "b", "c", start=start) is True
    assert "started" not in launch.printed and "stopping" not in launch.printed  # none runs
    assert [process.taken_back for process in start.started] == [True, True]
    assert {launch.state(name).status for name in "abc"} == {"queued"}
