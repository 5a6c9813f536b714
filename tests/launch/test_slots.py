import pytest
import torch

from gla_ablate.config import Config, ModelConfig
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch import slots
from gla_ablate.launch.places import Local


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many cores and GPUs; `visible` is the user's CUDA_VISIBLE_DEVICES."""

    def make(cores: int, gpus: int = 0, visible: str | None = None) -> None:
        monkeypatch.setattr(slots, "cores", lambda: cores)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


@pytest.mark.parametrize(
    ("cores", "jobs", "count", "threads"),
    [(1, None, 1, 1), (2, None, 2, 1), (8, None, 2, 4), (8, 3, 3, 2), (2, 4, 4, 1)],
)
def test_a_cpu_is_divided_by_its_cores(machine, cores, jobs, count, threads):
    machine(cores)
    assert slots.divide(jobs) == [{"OMP_NUM_THREADS": str(threads)}] * count


def test_each_gpu_has_a_slot_and_more_jobs_share_them_in_turn(machine):
    machine(16, gpus=2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots.divide(None)] == ["0", "1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots.divide(3)] == ["0", "1", "0"]
    assert slots.divide(None)[0]["OMP_NUM_THREADS"] == "8"


def test_several_trials_share_a_gpu_when_asked_to(machine):
    machine(16, gpus=2)
    found = slots.divide(None, per_gpu=3)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in found] == ["0", "1", "0", "1", "0", "1"]
    assert {slot["OMP_NUM_THREADS"] for slot in found} == {"2"}
    assert len(slots.divide(4, per_gpu=3)) == 4


@pytest.mark.parametrize(
    ("gpus", "jobs", "message"), [(0, None, "there is no GPU here"), (2, 5, "got 5, more than --per-gpu 2 on 2 GPUs")]
)
def test_more_trials_on_a_gpu_than_it_was_said_to_take_are_refused(machine, gpus, jobs, message):
    machine(16, gpus=gpus)
    with pytest.raises(ConfigError, match=message):
        slots.divide(jobs, per_gpu=2)


def test_only_the_gpus_that_the_user_shows_are_used(machine):
    machine(4, gpus=2, visible="3,GPU-8f2a")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots.divide(None)] == ["3", "GPU-8f2a"]
    machine(4, gpus=0, visible="")
    assert "CUDA_VISIBLE_DEVICES" not in slots.divide(None)[0]


def test_the_users_number_of_threads_stands(machine, monkeypatch):
    machine(8)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert slots.divide(2) == [{"OMP_NUM_THREADS": "5"}] * 2


@pytest.mark.parametrize(("given", "threads"), [("5", 5), (" 3 ", 3), ("4,2", 4), ("", None)])
def test_a_list_of_threads_counts_by_its_first(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert slots.threads() == threads


@pytest.mark.parametrize("given", ["0", "-1", "abc", "2.5", "²", "4,", "4,x", "9999999"])
def test_a_number_of_threads_that_is_none_is_refused(machine, monkeypatch, given):
    machine(8)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS: got '{given}', takes a whole number from 1"):
        slots.divide(2)


def test_a_trial_on_several_devices_has_a_slot_with_as_many_gpus(machine):
    machine(16, gpus=5, visible="3,4,5,6,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots.divide(None, devices=2)] == ["3,4", "5,6"]
    assert slots.divide(None, devices=2)[0]["OMP_NUM_THREADS"] == "8"
    with pytest.raises(ConfigError, match=r"trainer.devices: got 6, takes at most 5, the GPUs here"):
        slots.divide(None, devices=6)
    with pytest.raises(ConfigError, match=r"--per-gpu: .*trainer.devices 2"):
        slots.divide(None, per_gpu=2, devices=2)


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 2)])
def test_without_gpus_a_trial_on_several_devices_has_cores_for_them(machine, cores, count):
    machine(cores)
    assert len(slots.divide(None, devices=2)) == count


@pytest.mark.parametrize(
    ("gpus", "interpreted", "backends", "refused"),
    [
        (0, False, ("torch", "triton", "triton"), "got 'triton' in 2 of 3 trials to run \\(b\\)"),
        (0, True, ("torch", "triton", "triton"), None),
        (1, False, ("torch", "triton", "triton"), None),
        (0, False, ("torch", "auto", "auto"), None),
    ],
)
def test_kernels_for_a_gpu_are_refused_before_any_trial_where_there_is_none(
    machine, monkeypatch, tmp_path, gpus, interpreted, backends, refused
):
    machine(4, gpus=gpus)
    monkeypatch.setattr("gla_ablate.ops.op.interpreted", lambda: interpreted)
    trials = [
        Trial(name, {}, 0, Config(model=ModelConfig(backend=backend)))
        for name, backend in zip("abc", backends, strict=True)
    ]
    place = Local(None, None).open(trials, tmp_path)
    if refused is None:
        with place as found:
            assert len(found.slots) == max(gpus, 2 - gpus)
    else:
        with pytest.raises(ConfigError, match=refused), place:
            pytest.fail("it opened")
