"""The jobs of `--launcher slurm`: what is asked of SLURM and how its answers are read, without a trial that trains."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import submitit

from gla_ablate.errors import ConfigError
from gla_ablate.launch import on_slurm, slurm_job, slurm_queue
from gla_ablate.launch.slurm_options import CLUSTER, TAKEN, complete
from gla_ablate.status import read_json
from tests.launch import fake_slurm
from tests.test_kills import wait_for

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fake_slurm.install(tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("state", "again"), [("NODE_FAIL", True), ("CANCELLED by 7", False), ("TIMEOUT", False), ("", False)]
)
def test_a_job_that_is_gone_without_a_result_is_told_and_submitted_again_if_it_was_lost(
    slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, again: bool
) -> None:
    monkeypatch.setattr(on_slurm, "EVERY", 0.0)
    monkeypatch.setattr(slurm_queue, "EVERY", 0.0)
    monkeypatch.setattr(on_slurm, "LOOK", 0.0)
    process = on_slurm.OnSlurm(submitit.SlurmJob(tmp_path, "7"), tmp_path, slurm_queue.SlurmQueue())
    (tmp_path / "jobs" / "7").write_text("RUNNING")
    assert [process.poll() for _ in range(20)] == [None] * 20
    (tmp_path / "jobs" / "7").write_text(state)
    polls = [process.poll() for _ in range(20)]
    assert polls.count(None) == on_slurm.GONE - 1 and polls[-1] == 1
    assert process.again == again
    assert process.ended_by == "its job 7 ended without a result" + (f": {state}" if state else "")


@pytest.fixture
def start(slurm: None, tmp_path: Path) -> on_slurm.StartOnSlurm:
    return on_slurm.StartOnSlurm(tmp_path / "grid", complete([], None), 2)


@pytest.fixture
def homes(tmp_path: Path) -> list[Path]:
    """Trials that have nothing to run, so that their jobs fail."""
    found = [tmp_path / "grid" / f"trial{i}" for i in range(5)]
    for home in found:
        home.mkdir(parents=True)
    return found


def begin(start: on_slurm.StartOnSlurm, home: Path) -> Any:
    with open(os.devnull, "wb") as log:
        return start(home, {}, log)


def test_what_sbatch_takes_not_all_at_once_is_submitted_later(
    start: on_slurm.StartOnSlurm, homes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_slurm, "PATIENCE", 0.0)
    monkeypatch.setattr(on_slurm, "APART", 0.0)
    most = tmp_path / "jobs" / "most"
    most.write_text("2")
    start.submit_all(homes, {})
    assert list(start.submitted) == homes[:2]
    assert "#SBATCH --array=0-1%1\n" in (tmp_path / "jobs" / "last.sh").read_text()  # two of five, and so of the places
    processes = [begin(start, home) for home in homes[:2]]
    most.write_text("0")
    assert [begin(start, homes[2]) for _ in range(2 * on_slurm.REFUSALS)] == [None] * 2 * on_slurm.REFUSALS
    for process in processes:
        process.returncode = 0
    lost = begin(start, homes[2])  # nothing is left to wait for
    assert lost.poll() == 1 and "sbatch refused: " in lost.ended_by and "AssocMaxSubmitJobLimit" in lost.ended_by
    most.unlink()
    assert isinstance(begin(start, homes[2]), on_slurm.OnSlurm) and begin(start, homes[3]).poll() is None


def test_sbatch_is_not_asked_again_and_again(start: on_slurm.StartOnSlurm, homes: list[Path], tmp_path: Path) -> None:
    (tmp_path / "jobs" / "most").write_text("0")
    assert begin(start, homes[0]) is None
    (tmp_path / "jobs" / "most").unlink()
    assert begin(start, homes[0]) is None and not start.watched
    start.not_before = 0.0
    assert begin(start, homes[0]) and begin(start, homes[1]) is None


def test_an_interruption_while_jobs_are_submitted_waits_until_they_are_noted(
    start: on_slurm.StartOnSlurm, homes: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "jobs" / "interrupt").touch()
    with pytest.raises(KeyboardInterrupt):
        start.submit_all(homes, {})
    assert all(read_json(home / slurm_job.NOTE)["job"] == job.job_id for home, job in start.submitted.items())
    assert list(start.submitted) == homes
    start.cancel()
    assert {fake_slurm.state(id) for id in fake_slurm.ids()} == {"CANCELLED"}
    assert not any((home / slurm_job.NOTE).exists() for home in homes)


def test_jobs_that_scancel_did_not_cancel_are_told_and_found_again(
    start: on_slurm.StartOnSlurm, homes: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "jobs" / "down").touch()
    start.submit_all(homes[:2], {})
    numbers = [job.job_id for job in start.submitted.values()]
    start.terminate([begin(start, home) for home in homes[:2]])
    assert sorted(start.lingering) == numbers and start.take_up(homes) == homes[2:]


def test_a_job_that_has_ended_by_itself_does_not_look_like_one_that_could_not_be_cancelled(
    start: on_slurm.StartOnSlurm, homes: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "jobs" / "most").write_text("2")
    start.submit_all(homes[:2], {})
    first, second = (job.job_id for job in start.submitted.values())
    (tmp_path / "jobs" / first).write_text("COMPLETING")
    start.cancel()
    assert start.lingering == [] and fake_slurm.state(second) == "CANCELLED"


def test_tasks_of_an_array_are_cancelled_together() -> None:
    numbers = ["7", "8_0", "8_2", "8_1", "8_10", "9_2", "9_11", "9_10"]
    assert slurm_queue.ranges(numbers) == ["7", "8_[0-2]", "8_10", "9_2", "9_[10-11]"]
    assert slurm_queue.ranges([]) == []


def test_a_job_that_is_held_long_after_a_signal_goes_back_into_the_queue(
    slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_job, "HOLD", 0.0)
    monkeypatch.setattr(slurm_job.TrialJob, "start", lambda self: subprocess.Popen(["sh", "-c", "exit 130"]))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    job = slurm_job.TrialJob(tmp_path, {})
    assert job() == 130 and not fake_slurm.ids()  # run.py has cancelled it
    (tmp_path / slurm_job.NOTE).touch()
    with pytest.raises(SystemExit):
        job()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(SystemExit):
        job()
    assert {id: fake_slurm.state(id) for id in fake_slurm.ids()} == {"8": "REQUEUED", "7_3": "REQUEUED"}


def test_the_result_of_another_job_with_the_same_number_is_not_taken(tmp_path: Path) -> None:
    start = on_slurm.StartOnSlurm(tmp_path, complete([(CLUSTER, "local")], None), 1)
    job = submitit.LocalJob(start.folder, "7")
    start.folder.mkdir(exist_ok=True)
    job.paths.result_pickle.touch()
    os.utime(job.paths.result_pickle, (0, 0))
    start.executor.submit, start.executor.batch = lambda call: job, nullcontext
    start.submit([tmp_path], {})
    assert not job.paths.result_pickle.exists()


def test_processes_of_another_grid_are_not_taken_for_jobs_of_this(tmp_path: Path) -> None:
    folders = [tmp_path / "this", tmp_path / "other"]
    command = [sys.executable, "-c", "import time; time.sleep(60)", "submitit.local._local", str(folders[0])]
    with subprocess.Popen(command) as process:
        job = submitit.LocalJob(tmp_path, str(process.pid))
        wait_for(lambda: slurm_queue.LocalQueue(folders[0]).holds(job))
        assert not slurm_queue.LocalQueue(folders[1]).holds(job)
        process.kill()


def test_a_job_s_time_is_longer_than_its_trial_takes_to_save() -> None:
    assert complete([("time", 2)], 4) | {"time": 2, "cpus_per_task": 4, "signal_delay_s": 90} == complete(
        [("time", 2)], 4
    )
    with pytest.raises(ConfigError, match="time: got 1 minutes, which is no more than signal_delay_s"):
        complete([("time", 1)], None)
    assert complete([("time", 1), ("signal_delay_s", 30)], None)["time"] == 1


def test_while_slurm_s_controller_is_down_jobs_are_not_taken_for_gone(slurm: None, tmp_path: Path) -> None:
    jobs = [submitit.SlurmJob(tmp_path, number) for number in ("7", "8", "9_1")]
    queue = slurm_queue.SlurmQueue()
    assert not any(map(queue.holds, jobs))
    (tmp_path / "jobs" / "down").touch()
    assert all(map(slurm_queue.SlurmQueue().holds, jobs))
    queue.looked -= slurm_queue.EVERY
    assert all(map(queue.holds, jobs))


@pytest.mark.parametrize("number", ["../7", "7_1/../../7", "", 7.5, None, ["7"]])
def test_a_note_that_names_no_job_is_not_followed(tmp_path: Path, number: object) -> None:
    home = tmp_path / "trial"
    home.mkdir()
    (home / slurm_job.NOTE).write_text(json.dumps({"job": number, "cluster": "local"}))
    start = on_slurm.StartOnSlurm(tmp_path, complete([(CLUSTER, "local")], None), 1)
    start.queue = type("Any", (), {"holds": lambda self, job: True})()
    assert start.take_up([home]) == [home]
    (home / slurm_job.NOTE).write_text(json.dumps({"job": "7", "cluster": "local"}))
    assert start.take_up([home]) == []


def test_every_option_is_one_that_submitit_takes() -> None:
    assert set(TAKEN) - {CLUSTER} <= submitit.SlurmExecutor._valid_parameters()
