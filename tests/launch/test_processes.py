"""Trials as forks of a server, with stand-ins that it has imported for a trial."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gla_ablate.launch import processes
from gla_ablate.launch.processes import Fork, Spawn, starter
from tests.launch import stand_in
from tests.launch.stand_in import begin
from tests.test_cli import TINY
from tests.test_kills import wait_for

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="on Linux alone")
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from gla_ablate.launch import processes
processes.PRELOADED = ("json",)
home = Path(sys.argv[1])
(home / "trial").mkdir(exist_ok=True)
start = processes.Fork()
with open(home / "log.txt", "ab") as log:
    process = start(home / "trial", {"OMP_NUM_THREADS": "3"}, log)
while process.poll() is None:
    time.sleep(0.01)
print(json.dumps({"code": process.returncode, "forked": type(process).__name__, "pid": process.process.pid}))
"""


def script(home: Path, **options: object) -> subprocess.Popen[str]:
    """Without a guard for `__main__`, as users write them."""
    file = home / "script.py"
    file.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, file, home], stdout=subprocess.PIPE, text=True, env=env, **options)


def test_a_script_of_any_kind_can_start_trials_whose_output_is_their_log(tmp_path):
    out, _ = script(tmp_path).communicate(timeout=120)
    found = json.loads(out)  # printed once: the trial didn't run the script again
    assert found["code"] == 2 and found["forked"] == "Forked"
    assert "no config.yaml here" in (tmp_path / "log.txt").read_text()


SIGNALS_ALONE = ("gla_ablate.launch.server_signals",)  # of what a server imports, which takes seconds


@pytest.fixture
def fork(monkeypatch):
    """A starter whose trials note how they run, and then do what their folder's name says."""
    monkeypatch.setattr(processes, "run", stand_in.run)
    monkeypatch.setattr(processes, "PRELOADED", SIGNALS_ALONE)
    return Fork()


def note_of(home: Path) -> dict:
    deadline = time.monotonic() + 60
    while not (home / "note.json").exists() or not (home / "note.json").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return json.loads((home / "note.json").read_text())


def ended(process) -> int:
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process.returncode


def test_a_forked_trial_has_a_session_threads_and_a_log_of_its_own(fork, tmp_path):
    process = begin(fork, tmp_path / "ends")
    assert ended(process) == 7
    note = note_of(tmp_path / "ends")
    assert note["session"] == note["pid"] != os.getpid() and note["threads"] == "3" and not note["lightning"]
    assert (tmp_path / "ends" / "log.txt").read_text().splitlines()[-2:] == ["printed", "to the descriptor"]
    assert os.environ.get("OMP_NUM_THREADS") != "3"


def test_a_forked_trial_finds_its_imports_done(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "run", stand_in.run)
    assert ended(begin(Fork(), tmp_path / "ends")) == 7 and note_of(tmp_path / "ends")["lightning"]


def test_a_sigterm_just_after_the_fork_is_not_lost(fork, tmp_path):
    for i in range(10):
        process = begin(fork, tmp_path / f"waits{i}")
        process.terminate()
        assert ended(process) == -signal.SIGTERM


def test_a_trial_whose_server_is_killed_before_it_forks_is_killed_and_the_next_gets_another(
    fork, tmp_path, monkeypatch
):
    def start(self) -> None:
        raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr(processes.ForkedProcess, "start", start)
        assert begin(fork, tmp_path / "waits").poll() == -signal.SIGKILL
    assert ended(begin(fork, tmp_path / "ends")) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_gets_a_signal_while_it_imports_does_not_break_or_hold_up_the_grid(number, tmp_path):
    """As the whole group does by Ctrl-C."""
    (tmp_path / "t.yaml").write_text(f"{TINY}seeds: [0, 1, 2]\n")
    run = subprocess.Popen(
        [sys.executable, ROOT / "run.py", "t.yaml", "trainer.max_steps=100000", "trainer.val_every=1000"],
        cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    server = wait_for(lambda: run.poll() is not None or server_of(run.pid))
    assert run.poll() is None, run.communicate()
    time.sleep(0.5)  # of the seconds that it imports
    if number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(run.pid, number)
    else:
        os.kill(server, number)
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in out, out
    assert time.monotonic() - began < 25  # less than the grace
    wait_for(lambda: not Path(f"/proc/{server}").exists(), 20)


def server_of(pid: int) -> int | None:
    """The fork server among the processes that `pid` has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return next((int(x) for x in children if b"forkserver" in Path(f"/proc/{x}/cmdline").read_bytes()), None)
    except OSError:
        return None


@pytest.mark.parametrize(("how", "code"), [("terminate", -signal.SIGTERM), ("kill", -signal.SIGKILL)])
def test_a_forked_trial_ends_by_a_signal_and_says_which(how, code, fork, tmp_path):
    process = begin(fork, tmp_path / "waits")
    note_of(tmp_path / "waits")
    getattr(process, how)()
    assert ended(process) == code


def test_a_killed_server_takes_its_trials_with_it_and_the_next_trial_gets_another(fork, tmp_path):
    process = begin(fork, tmp_path / "waits")
    note = note_of(tmp_path / "waits")
    os.kill(note["parent"], signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL  # so that it counts as lost, and is retried
    deadline = time.monotonic() + 30
    while Path(f"/proc/{note['pid']}").exists():
        assert time.monotonic() < deadline, "an orphan runs on"
        time.sleep(0.02)
    again = begin(fork, tmp_path / "ends")
    assert ended(again) == 7 and note_of(tmp_path / "ends")["parent"] != note["parent"]


def test_an_exit_code_of_255_is_the_trials_own(fork, tmp_path):
    assert ended(begin(fork, tmp_path / "255")) == 255


def test_a_server_that_was_stopped_goes_on(fork, tmp_path):
    first = begin(fork, tmp_path / "waits")
    server = note_of(tmp_path / "waits")["parent"]
    os.kill(server, signal.SIGSTOP)
    first.kill()
    assert ended(first) == -signal.SIGKILL
    os.kill(server, signal.SIGSTOP)
    assert ended(begin(fork, tmp_path / "7")) == 7 and note_of(tmp_path / "7")["parent"] == server


def test_trials_have_the_environment_of_the_call_that_starts_them(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "run", stand_in.run)
    monkeypatch.setattr(processes, "PRELOADED", SIGNALS_ALONE)
    notes = []
    for i, value in enumerate(["one", "one", "two", None]):
        monkeypatch.setenv(stand_in.VARIABLE, value) if value else monkeypatch.delenv(stand_in.VARIABLE)
        assert ended(begin(Fork(), tmp_path / str(i))) == i
        notes.append(note_of(tmp_path / str(i)))
    assert [note["variable"] for note in notes] == ["one", "one", "two", None]
    servers = [note["parent"] for note in notes]
    assert servers[0] == servers[1] and len(set(servers)) == 3  # what it has imported may depend on it


LAUNCHER = """
import sys, time
from pathlib import Path
from gla_ablate.launch import processes
from tests.launch import stand_in
processes.run, processes.PRELOADED = stand_in.run, ("gla_ablate.launch.server_signals",)
stand_in.begin(processes.Fork(), Path(sys.argv[1]))
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_takes_its_trials_with_it(number, tmp_path):
    file = tmp_path / "launcher.py"
    file.write_text(LAUNCHER)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, file, tmp_path / "waits"], env=env, start_new_session=True)
    note = note_of(tmp_path / "waits")
    if number == signal.SIGTERM:  # to all of the session's processes, of which the trial isn't one
        os.killpg(launcher.pid, number)
    else:
        launcher.kill()
    launcher.wait(10)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in (note["pid"], note["parent"])):
        assert time.monotonic() < deadline, "an orphan runs on"
        time.sleep(0.02)


def test_the_server_outlives_a_sigterm_so_that_its_trials_can_save(fork, tmp_path):
    process = begin(fork, tmp_path / "waits")
    note = note_of(tmp_path / "waits")
    os.kill(note["parent"], signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None and Path(f"/proc/{note['pid']}").exists()
    process.kill()
    assert ended(process) == -signal.SIGKILL


def test_without_room_for_a_socket_trials_are_spawned(monkeypatch):
    def no_room() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(processes, "Fork", no_room)
    assert isinstance(starter([{"OMP_NUM_THREADS": "1"}]), Spawn)


def test_trials_on_gpus_are_interpreters_of_their_own():
    assert isinstance(starter([{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}]), Spawn)
    assert isinstance(starter([{"OMP_NUM_THREADS": "1"}]), Fork)
