"""The jobs of `--launcher slurm`: what is asked of SLURM and how its answers are read, without a trial that trains."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import submitit
from filelock import FileLock

from gla_ablate.config import Config
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch import on_slurm, places, slurm_job, slurm_queue
from gla_ablate.launch.slurm_options import CLUSTER, TAKEN, complete, not_for_jobs
from gla_ablate.status import read_json
from tests.launch import fake_slurm
from tests.test_kills import wait_for

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fake_slurm.install(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "jobs" / "busy").touch()


@pytest.mark.parametrize(
    ("state", "again"), [("NODE_FAIL", True), ("CANCELLED by 7", False), ("TIMEOUT", False), ("", False)]
)
def test_a_job_that_is_gone_without_a_result_is_told_and_submitted_again_if_it_was_lost(
    slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, again: bool
) -> None:
    monkeypatch.setattr(on_slurm, "EVERY", 0.0)
    monkeypatch.setattr(slurm_queue, "EVERY", 0.0)
    is_done = slurm_queue.Command.is_done
    monkeypatch.setattr(slurm_queue.Command, "is_done", lambda self, wait: is_done(self, True))
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


def note(home: Path, number: str) -> None:
    (home / slurm_job.NOTE).write_text(json.dumps({"job": number, "cluster": "slurm"}))


def begin(start: on_slurm.StartOnSlurm, home: Path) -> Any:
    with open(os.devnull, "wb") as log:
        return start(home, {}, log)


def test_what_sbatch_takes_not_all_at_once_is_submitted_later(
    start: on_slurm.StartOnSlurm, homes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_slurm, "PATIENCE", 0.0)
    monkeypatch.setattr(on_slurm, "APART", 0.0)
    monkeypatch.setattr(start, "count", 5)
    most = tmp_path / "jobs" / "most"
    most.write_text("2")
    start.submit_all(homes, {})
    assert list(start.submitted) == homes[:2]
    assert "#SBATCH --array=0-1%2\n" in (tmp_path / "jobs" / "last.sh").read_text()  # two of five, and so of the places
    processes = [begin(start, home) for home in homes[:2]]
    most.write_text("0")
    assert [begin(start, homes[2]) for _ in range(2 * on_slurm.REFUSALS)] == [None] * 2 * on_slurm.REFUSALS
    for process in processes:
        process.returncode = 0
    tries = [begin(start, homes[2]) for _ in range(on_slurm.REFUSALS)]  # nothing is left to wait for
    assert tries[:-1] == [None] * (on_slurm.REFUSALS - 1)
    lost = tries[-1]
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


def test_a_job_that_completes_may_have_been_put_back_into_the_queue(slurm: None, tmp_path: Path) -> None:
    (tmp_path / "jobs" / "7").write_text("COMPLETING")
    assert slurm_queue.SlurmQueue().holds(submitit.SlurmJob(tmp_path, "7"))


def test_no_more_jobs_are_submitted_one_by_one_than_may_run(
    start: on_slurm.StartOnSlurm, homes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_slurm, "APART", 0.0)
    first, second = begin(start, homes[0]), begin(start, homes[1])
    assert first and second and begin(start, homes[2]) is None
    first.returncode = 0
    assert begin(start, homes[2])


def test_jobs_of_an_earlier_call_count_among_those_that_may_run(
    start: on_slurm.StartOnSlurm, homes: list[Path], tmp_path: Path
) -> None:
    start.submit_all(homes[:1], {})
    start.submit_all(homes[1:], {})
    assert "#SBATCH --array=0-3%1\n" in (tmp_path / "jobs" / "last.sh").read_text()


def test_of_many_arrays_no_more_are_submitted_than_trials_may_run(
    start: on_slurm.StartOnSlurm, homes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_slurm, "ARRAY", 2)
    start.submit_all(homes, {})
    assert list(start.submitted) == homes[:4]


def test_jobs_whose_notes_could_not_be_written_are_known_all_the_same(
    start: on_slurm.StartOnSlurm, homes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_slurm, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        start.submit_all(homes, {})
    start.cancel()
    assert [fake_slurm.state(job.job_id) for job in start.submitted.values()] == ["CANCELLED"] * 5


def test_what_is_left_when_a_place_closes_is_cancelled_and_what_is_submitted_comes_first(
    slurm: None, homes: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "jobs" / "most").write_text("2")
    trials = [Trial(home.name, {}, 0, Config()) for home in homes]
    before = on_slurm.StartOnSlurm(tmp_path / "grid", complete([], None), 2)
    before.submit_all([homes[3]], {})
    todo = list(trials)
    with places.Slurm(4, []).open(todo, tmp_path / "grid") as place:
        assert [trial.id for trial in todo] == ["trial0", "trial3", "trial1", "trial2", "trial4"]
        begin(place.start, homes[0])
    job_of_3 = before.submitted[homes[3]].job_id
    assert [id for id in fake_slurm.ids() if fake_slurm.state(id) == "CANCELLED"] == [job_of_3]
    assert (homes[0] / slurm_job.NOTE).exists() and not (homes[3] / slurm_job.NOTE).exists()


def test_the_accounting_is_asked_once_for_an_array(slurm: None, tmp_path: Path) -> None:
    queue = slurm_queue.SlurmQueue()
    for i, state in enumerate(("NODE_FAIL", "PREEMPTED")):
        (tmp_path / "jobs" / f"7_{i}").write_text(state)
    found = [queue.last_state(submitit.SlurmJob(tmp_path, f"7_{i}")) for i in range(3)]
    assert found == ["NODE_FAIL", "PREEMPTED", ""]
    assert len((tmp_path / "jobs" / "sacct").read_text().splitlines()) == 1


def test_a_command_of_slurm_s_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_queue, "LONGEST", 0.2)
    command = slurm_queue.Command("sleep", "60")
    assert not command.is_done(wait=False)
    began = time.monotonic()
    assert command.is_done(wait=True) and command.printed is None and time.monotonic() - began < 10
    assert slurm_queue.output("false") is None and slurm_queue.output("no-such-command") is None


def test_looking_into_the_queue_does_not_hold_up_what_looks(
    slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, job = slurm_queue.SlurmQueue(), submitit.SlurmJob(tmp_path, "7")
    (tmp_path / "jobs" / "7").write_text("RUNNING")
    assert queue.holds(job)
    (tmp_path / "jobs" / "7").write_text("COMPLETED")
    queue.looked -= slurm_queue.EVERY
    assert queue.holds(job)  # squeue has only begun
    wait_for(lambda: not queue.holds(job), 20)


def test_what_a_job_of_slurm_s_that_runs_run_py_has_is_not_for_its_jobs() -> None:
    environment = ["SLURM_JOB_ID", "SLURM_CONF", "SRUN_DEBUG", "SUBMITIT_EXECUTOR", "PATH", "SBATCH_PARTITION"]
    environment += ["SBATCH_TIMELIMIT", "SBATCH_ACCOUNT", "SBATCH_NO_REQUEUE", "SLURMD_NODENAME"]
    gone = not_for_jobs(environment, {"partition": "gpu", "time": 60})
    assert set(environment) - set(gone) == {"SLURM_CONF", "PATH", "SBATCH_ACCOUNT"}


def test_a_result_that_is_only_half_there_is_none_yet(
    slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_slurm, "LOOK", 0.0)
    (tmp_path / "jobs" / "7").write_text("RUNNING")
    job = submitit.SlurmJob(tmp_path, "7")
    process = on_slurm.OnSlurm(job, tmp_path, slurm_queue.SlurmQueue())
    content = pickle.dumps(("success", 0))
    for part in (b"", content[:-5], pickle.dumps(("success", print))):  # the last one would call
        job.paths.result_pickle.write_bytes(part)
        assert process.poll() is None
    job.paths.result_pickle.write_bytes(content)
    assert process.poll() == 0


def test_tasks_of_an_array_are_cancelled_together() -> None:
    numbers = ["7", "8_0", "8_2", "8_1", "8_10", "9_2", "9_11", "9_10"]
    assert slurm_queue.ranges(numbers) == ["7", "8_[0-2]", "8_10", "9_2", "9_[10-11]"]
    assert slurm_queue.ranges([]) == []


def test_a_job_that_is_held_long_after_a_signal_goes_back_into_the_queue(
    slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_job, "HOLD", 0.0)
    trial = ["exit 130", "kill $$"]  # told to end as it listens, and before
    monkeypatch.setattr(slurm_job.TrialJob, "start", lambda self: subprocess.Popen(["sh", "-c", trial.pop(0)]))
    job = slurm_job.TrialJob(tmp_path, {})
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    note(tmp_path, "8")
    with pytest.raises(SystemExit):
        job()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    note(tmp_path, "7_3")
    with pytest.raises(SystemExit):
        job()
    assert {id: fake_slurm.state(id) for id in fake_slurm.ids()} == {"8": "REQUEUED", "7_3": "REQUEUED"}


@pytest.mark.parametrize("number", [None, "9"])
def test_a_job_that_nobody_wants_does_not_run_its_trial_nor_go_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str | None
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setattr(slurm_job, "NOTED", 0.0)
    monkeypatch.setattr(slurm_job, "HOLD", 0.0)
    job = slurm_job.TrialJob(tmp_path, {})
    note(tmp_path, "8")
    assert isinstance(job.checkpoint(), submitit.helpers.DelayedSubmission)
    if number:
        note(tmp_path, number)  # of another job for the trial
    else:
        (tmp_path / slurm_job.NOTE).unlink()
    assert job.checkpoint() is None and job() == 130 and not (tmp_path / "log.txt").exists()


def test_a_job_waits_for_its_note_and_for_another_process_of_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setattr(slurm_job.TrialJob, "start", lambda self: subprocess.Popen(["true"]))
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(slurm_job.TrialJob(tmp_path, {})()))
    with FileLock(tmp_path / "trial.lock"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not (tmp_path / "log.txt").exists()
        note(tmp_path, "8")
        wait_for((tmp_path / "log.txt").exists)
        assert "waiting for another process" in (tmp_path / "log.txt").read_text() and not ended
    thread.join(10)
    assert ended == [0]


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
    options = complete([("time", 3)], 4)
    assert options | {"time": 3, "cpus_per_task": 4, "signal_delay_s": 90} == options
    for minutes, delay in ((1, 30), (2, 90), (2, 60)):
        with pytest.raises(ConfigError, match=f"time: got {minutes} minutes, so a trial might be told to save"):
            complete([("time", minutes), ("signal_delay_s", delay)], None)
    assert complete([("time", 2), ("signal_delay_s", 59)], None)["time"] == 2


def test_while_slurm_s_controller_is_down_jobs_are_not_taken_for_gone(slurm: None, tmp_path: Path) -> None:
    jobs = [submitit.SlurmJob(tmp_path, number) for number in ("7", "8", "9_1")]
    queue = slurm_queue.SlurmQueue()
    assert not any(map(queue.holds, jobs))
    (tmp_path / "jobs" / "down").touch()
    assert all(map(slurm_queue.SlurmQueue().holds, jobs))
    queue.looked -= slurm_queue.EVERY
    wait_for(lambda: all(map(queue.holds, jobs)), 20)


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


def test_a_job_of_several_devices_has_gpus_and_cpus_for_them() -> None:
    assert complete([], None, devices=4)["cpus_per_task"] == 4
    assert complete([("gpus_per_node", 8)], 2, devices=4)["cpus_per_task"] == 2
    with pytest.raises(ConfigError, match=r"gpus_per_node: got 1, takes at least 4 \(trainer.devices\)"):
        complete([("gpus_per_node", 1)], None, devices=4)
