"""`--launcher slurm`: through submitit's own local executor, and against a stand-in for SLURM's commands."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gla_ablate.cli import main
from gla_ablate.launch.state import State
from gla_ablate.status import read_json
from tests.launch import fake_slurm
from tests.launch.commands import run
from tests.test_cli import PLUGIN as GATES_OF_THE_COMMAND
from tests.test_cli import TINY, statuses
from tests.test_kills import PAUSE, alive, parent, paused, training, trials, wait_for, write_grid
from tests.test_resume import outcome

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's"),
    pytest.mark.xdist_group("clusters"),
]
LONG = "trainer.max_steps=20000"  # for trials that have not ended when they are told to
LOCAL = ("--launcher", "slurm", "--slurm", "cluster=local")
SLURM = ("--launcher", "slurm", "--jobs", "2", "--slurm", "partition=small", "--slurm", "time=60")


@pytest.fixture
def grid(tmp_path: Path, scratch_registry: None) -> Iterator[Path]:
    yield write_grid(tmp_path)
    mark = f"GLA_TEST_PAUSE={tmp_path / PAUSE}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):  # what a test that failed has left, stopped perhaps
        with suppress(OSError):
            if mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fake_slurm.install(tmp_path).items():
        monkeypatch.setenv(name, value)


def halt(running: dict[Path, dict[str, Any]]) -> list[int]:
    """Stop the trials where they are; their processes."""
    found = [running[home]["pid"] for home in sorted(running)]
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return found


def submissions(folder: Path) -> int:
    return len(list((folder / "runs" / "grid" / "slurm").glob("*_submitted.pkl")))


def went_on(folder: Path) -> list[bool]:
    return ["going on from step" in (home / "log.txt").read_text() for home in trials(folder / "runs")]


def first_lines(process: subprocess.Popen[str], count: int) -> str:
    """So many lines of what a command prints, as soon as it has."""
    assert process.stdout is not None
    return "".join(process.stdout.readline() for _ in range(count))


def test_jobs_outlive_a_killed_launcher_are_taken_up_and_resume_when_preempted(grid: Path, whole: Any) -> None:
    (grid / PAUSE).touch()
    first = run(grid, "grid.yaml", *LOCAL)
    pids = halt(paused(grid, first))
    first.kill()
    first.wait()
    (grid / PAUSE).unlink()
    second = run(grid, "grid.yaml", *LOCAL)
    assert "2 at a time as jobs, 2 of them submitted before" in first_lines(second, 1)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):  # as SLURM sends them, to all processes of a job
        for pid in (pids[0], parent(pids[0])):
            os.kill(pid, number)
    os.kill(pids[1], signal.SIGCONT)
    out, _ = second.communicate(timeout=180)
    assert second.returncode == 0, out
    assert submissions(grid) == 2 and went_on(grid) == [True, False]
    assert {home.name: outcome(home) for home in trials(grid / "runs")} == whole
    assert not list(grid.glob("runs/grid/*/job.json"))


def test_an_interrupted_launcher_cancels_its_jobs_which_save(grid: Path) -> None:
    process = run(grid, "grid.yaml", LONG, *LOCAL)
    wait_for(lambda: len(training(grid / "runs", 0)) == 2 or process.poll() is not None)
    running = training(grid / "runs", 0)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in out, out
    wait_for(lambda: not any(alive(status["pid"]) for status in running.values()), 10)
    for home in running:
        assert State.read(home).status == "interrupted" and not (home / "job.json").exists()


def test_a_second_signal_kills_a_job_s_trial_that_does_not_listen(grid: Path) -> None:
    process = run(grid, "grid.yaml", "seeds=[0]", LONG, *LOCAL)
    running = wait_for(lambda: training(grid / "runs", 0) or process.poll() is not None)
    (pid,) = halt(running)  # it can't
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    out, _ = process.communicate(timeout=25)  # less than the grace
    assert process.returncode == 130, out
    wait_for(lambda: not alive(pid), 10)


def test_a_failing_job_s_trial_has_its_reason_and_the_other_finishes(tmp_path: Path) -> None:
    (tmp_path / "gates.py").write_text(GATES_OF_THE_COMMAND)
    broken = "grid: {model.gate: [{name: e2e_broken}, {name: none}]}\nplugins: [gates.py]\n"
    (tmp_path / "t.yaml").write_text(TINY + broken)
    process = run(tmp_path, "t.yaml", *LOCAL, "--jobs", "1")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "1 at a time as jobs" in out
    assert statuses(tmp_path / "runs" / "t") == {"e2e_broken": "diverged", "none": "finished"}
    assert "loss is nan at step 1" in out


def test_an_array_s_preempted_job_is_requeued_and_resumes(slurm: None, grid: Path, whole: Any) -> None:
    (grid / PAUSE).touch()
    process = run(grid, "grid.yaml", *SLURM)
    halt(paused(grid, process))
    (grid / PAUSE).unlink()
    script = (grid / "jobs" / "last.sh").read_text()
    for line in ("array=0-1%2", "partition=small", "time=60", "requeue", "cpus-per-task=1", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in script
    first, second = sorted(read_json(home / "job.json")["job"] for home in trials(grid / "runs"))
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        fake_slurm.tell(first, number)
    fake_slurm.tell(second, signal.SIGCONT)
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0 and "killed" not in out, out
    assert went_on(grid) == [True, False] and len(list((grid / "runs/grid/slurm").glob("*_submission.sh"))) == 1
    assert {home.name: outcome(home) for home in trials(grid / "runs")} == whole


def test_jobs_of_slurm_s_are_taken_up_and_cancelled(slurm: None, grid: Path) -> None:
    first = run(grid, "grid.yaml", LONG, *SLURM, "--jobs", "1")
    wait_for(lambda: training(grid / "runs", 0) or first.poll() is not None)
    halt(training(grid / "runs", 0))
    assert first.poll() is None
    first.kill()
    first.wait()
    second = run(grid, "grid.yaml", LONG, *SLURM)
    assert "2 of them submitted before" in first_lines(second, 2)  # the second: it watches
    (pid,) = (status["pid"] for status in training(grid / "runs", 0).values())
    os.kill(pid, signal.SIGCONT)
    second.send_signal(signal.SIGTERM)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 130, out
    assert {fake_slurm.state(id) for id in fake_slurm.ids()} == {"CANCELLED"}
    assert len((grid / "jobs" / "scancel").read_text().splitlines()) == 1
    assert sorted(State.read(home).status for home in trials(grid / "runs")) == ["interrupted", "queued"]
    wait_for(lambda: not alive(pid), 10)


def test_what_sbatch_refuses_beside_a_job_that_was_taken_up_does_not_keep_it_from_being_cancelled(
    slurm: None, grid: Path
) -> None:
    first = run(grid, "grid.yaml", LONG, *SLURM, "seeds=[1]")
    wait_for(lambda: training(grid / "runs", 0) or first.poll() is not None)
    first.kill()
    first.wait()
    second = run(grid, "grid.yaml", LONG, *SLURM, "--slurm", "partition=closed")
    assert "1 of them submitted before" in first_lines(second, 2)
    second.send_signal(signal.SIGINT)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 130, out
    assert {fake_slurm.state(id) for id in fake_slurm.ids()} == {"CANCELLED"}


def test_what_sbatch_refuses_is_one_line(slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.yaml").write_text(TINY)
    command = [str(tmp_path / "t.yaml"), "--out", str(tmp_path / "runs"), "--launcher", "slurm"]
    assert main([*command, "--slurm", "partition=closed"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "sbatch refused: " in err and "invalid partition specified: closed" in err


def test_a_cancelled_launcher_says_which_jobs_may_go_on(slurm: None, grid: Path) -> None:
    process = run(grid, "grid.yaml", *SLURM, "seeds=[0]", LONG)
    wait_for(lambda: training(grid / "runs", 0) or process.poll() is not None)
    (pid,) = halt(training(grid / "runs", 0))
    (grid / "jobs" / "down").touch()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    number = next(id for id in fake_slurm.ids() if fake_slurm.state(id) == "RUNNING")
    assert f"scancel failed, so these jobs may go on; the same command finds them: {number}\n" in out
    (grid / "jobs" / "down").unlink()
    fake_slurm.scancel("--signal=KILL", number)
    wait_for(lambda: not alive(pid), 10)


def test_without_slurm_or_submitit_it_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.yaml").write_text(TINY)
    command = [str(tmp_path / "t.yaml"), "--out", str(tmp_path / "runs"), "--launcher", "slurm"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(command) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command) == 2
    assert "needs submitit, which isn't installed: pip install -e '.[slurm]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
