"""A trial that was stopped anywhere, and goes on, ends as one that never stopped: bit for bit on a CPU."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gla_ablate import resume
from gla_ablate.config import resolve, write_config
from gla_ablate.interruption import Interrupted, Interruption
from gla_ablate.trial import DISK_FULL
from tests.registries import scratch_registries
from tests.test_trial import CURVES_OF_TIME, metrics, read, run

# A gate that draws random numbers as it runs, and sends its process what GLA_TEST_SIGNAL says, "signal@call".
PLUGIN = """
import os
import random
import time
import numpy
import torch
from gla_ablate.model import Gate, GateShape, register_gate

@register_gate("drawing")
class Drawing(Gate):
    decay_shape = "[B,T,H]"

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.proj, self.calls = torch.nn.Linear(shape.dim, shape.heads), 0

    def forward(self, x):
        if len(x) == 1:  # before the first step, when it is tried
            return -torch.ones(1, x.shape[1], self.proj.out_features)
        self.calls += 1
        number, call = os.environ.get("GLA_TEST_SIGNAL", "0@0").split("@")
        if self.calls == int(call):
            os.kill(os.getpid(), int(number))
        pause = os.environ.get("GLA_TEST_PAUSE")
        if pause and self.calls == 60:
            open(f"{pause}.{os.getpid()}", "w").close()
            while os.path.exists(pause):
                time.sleep(0.02)
        noise = torch.rand(x.shape[:2]).to(x.device)[..., None] + random.random() + numpy.random.rand()
        return torch.nn.functional.logsigmoid(self.proj(x)) / 16 - 0.01 * noise
"""
DATA = {"name": "mqar", "seq_len": 16, "batch_size": 4, "vocab_size": 32, "pairs": 3, "train_examples": 64}
DATA |= {"val_tokens": 160}  # three batches
MODEL = {"dim": 32, "layers": 1, "heads": 2, "chunk_size": 16, "gate": {"name": "drawing"}}
TRAINER = {"max_steps": 11, "val_every": 4, "log_every": 3, "precision": "32-true"}
OF_TIME = {"seconds", "setup", "tokens_per_s", "peak_mem_mb", "mfu", "matrix_flops_per_s"}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("plugin") / "drawing.py"
    path.write_text(PLUGIN)
    with scratch_registries():
        yield path


def trial(folder: Path, plugin: Path, **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"model": MODEL, "data": DATA, "trainer": TRAINER | trainer, "plugins": [str(plugin)], "seed": 5}
    write_config(resolve(values), folder / "config.yaml")
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be the same however often the trial stopped; fails where a step is logged twice."""
    result = {key: value for key, value in read(folder, "result.json").items() if key not in OF_TIME}
    result["metrics"] = {tag: value for tag, value in result["metrics"].items() if tag not in CURVES_OF_TIME}
    curves = metrics(folder)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    assert set(events.Tags()["scalars"]) == set(curves)
    for tag, steps in curves.items():
        assert [point.step for point in events.Scalars(tag)] == list(steps), tag
    histograms = {
        tag: [(point.step, point.histogram_value.bucket) for point in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }
    of_time = {tag: list(curves.pop(tag)) for tag in CURVES_OF_TIME if tag in curves}
    checkpoint = torch.load(resume.last(folder), weights_only=True)
    weights = {name: x.tolist() for name, x in checkpoint["state_dict"].items()}
    moments = [
        {name: x.tolist() for name, x in state.items()} for state in checkpoint["optimizer_states"][0]["state"].values()
    ]
    return {
        "result": result, "curves": curves, "logged": of_time, "histograms": histograms, "weights": weights,
        "moments": moments, "schedule": checkpoint["lr_schedulers"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = trial(tmp_path_factory.mktemp("undisturbed") / "trial", plugin)
    assert run(folder) == 0
    return outcome(folder)


@pytest.fixture(scope="module")
def undisturbed_in_parts(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = trial(tmp_path_factory.mktemp("undisturbed") / "trial", plugin, accumulate=2)
    assert run(folder) == 0
    return outcome(folder)


@pytest.mark.parametrize("call", [1, 2, 6, 14, 25])
def test_interrupted_at_any_micro_batch_it_sees_the_step_through_and_goes_on(
    undisturbed_in_parts: dict[str, Any], plugin: Path, tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trial(tmp_path / "trial", plugin, accumulate=2)
    monkeypatch.setenv("GLA_TEST_SIGNAL", f"{int(signal.SIGTERM)}@{call}")
    assert run(folder) == 130
    # two calls a step; after steps 4 and 8 five batches of validation, each of two rows, the first of which is call 9
    calls = [2 * step + 5 * (step > 4) + 5 * (step > 8) for step in range(1, 12)]
    done = next(step for step, last in enumerate(calls, 1) if call <= last or (call <= last + 5 and step in (4, 8)))
    checkpoint = torch.load(resume.last(folder), weights_only=True)
    assert checkpoint["global_step"] == checkpoint["DataModule"]["start_step"] == read(folder, "status.json")["step"]
    assert checkpoint["global_step"] == done
    monkeypatch.delenv("GLA_TEST_SIGNAL")
    assert run(folder) == 0
    assert outcome(folder) == undisturbed_in_parts


# 11 steps and, after steps 4, 8 and 11, three batches of validation: 20 calls of the gate
@pytest.mark.parametrize("call", [1, 2, 4, 5, 7, 8, 16, 17, 18, 20])
def test_interrupted_at_any_call_it_goes_on_as_if_nothing_had_been(
    undisturbed: dict[str, Any], plugin: Path, tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trial(tmp_path / "trial", plugin)
    monkeypatch.setenv("GLA_TEST_SIGNAL", f"{int(signal.SIGTERM)}@{call}")
    code = run(folder)
    status = read(folder, "status.json")
    if code == 130:
        checkpoint = torch.load(resume.last(folder), weights_only=True)
        # a validation is seen through; calls 5 to 7 are the first, 12 to 14 the second
        done = call if call <= 4 else 4 if call <= 7 else call - 3 if call <= 11 else 8 if call <= 14 else call - 6
        assert checkpoint["global_step"] == status["step"] == done
        assert status["status"] == "interrupted" and status["reason"] == f"by SIGTERM at step {status['step']}"
    else:  # nothing is left to do when the last step has been validated
        assert (code, status["status"]) == (0, "finished") and call > 17
    monkeypatch.delenv("GLA_TEST_SIGNAL")
    assert run(folder) == 0
    assert outcome(folder) == undisturbed


@pytest.fixture
def stopped(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trial that was interrupted at step 7, in the middle between two validations."""
    folder = trial(tmp_path / "trial", plugin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_TEST_SIGNAL", f"{int(signal.SIGTERM)}@10")
        assert run(folder) == 130
    assert read(folder, "status.json")["step"] == 7
    return folder


class Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def cut_short(folder: Path) -> None:
    os.truncate(resume.last(folder), resume.last(folder).stat().st_size // 2)


def flipped(folder: Path) -> None:
    content = bytearray(resume.last(folder).read_bytes())
    with zipfile.ZipFile(resume.last(folder)) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    for i in range(largest.header_offset + 500, largest.header_offset + 600):
        content[i] ^= 255
    resume.last(folder).write_bytes(content)


def without(*keys: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        checkpoint = torch.load(resume.last(folder), weights_only=True)
        part = checkpoint
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        torch.save(checkpoint, resume.last(folder))

    damage.__name__ = f"without_{keys[-1]}"
    return damage


def with_a_log_of_zeros(folder: Path) -> None:
    size = (folder / "metrics.csv").stat().st_size
    (folder / "metrics.csv").write_bytes(bytes(size))


def with_other_data(folder: Path) -> None:
    stamp = read(folder, "stamp.json")
    stamp["data"]["name"] = "another"
    (folder / "stamp.json").write_text(json.dumps(stamp))


def emptied(folder: Path) -> None:
    resume.last(folder).write_bytes(b"")


def of_another_format(folder: Path) -> None:
    checkpoint = torch.load(resume.last(folder), weights_only=True)
    checkpoint["callbacks"][resume.KEY]["format"] = resume.FORMAT + 1
    torch.save(checkpoint, resume.last(folder))


def of_lightning_alone(folder: Path) -> None:
    checkpoint = torch.load(resume.last(folder), weights_only=True)
    del checkpoint["callbacks"][resume.KEY]
    torch.save(checkpoint, resume.last(folder))


def of_another_model(folder: Path) -> None:
    checkpoint = torch.load(resume.last(folder), weights_only=True)
    checkpoint["state_dict"]["model.embedding.weight"] = torch.zeros(3, 32)
    torch.save(checkpoint, resume.last(folder))


def with_code(folder: Path) -> None:
    torch.save({"state_dict": Touch(folder / "executed")}, resume.last(folder))


def with_a_log_that_lost_its_end(folder: Path) -> None:
    os.truncate(folder / "metrics.csv", 20)


DAMAGE = {
    cut_short: "can't be read",
    emptied: "can't be read",
    flipped: "the checksum of",
    without("loops"): "something is missing in it",
    without("DataModule"): "something is missing in it",
    without("callbacks", resume.KEY, "generators", "numpy"): "something is missing in it",
    without("callbacks", "TrainingLog"): "can't be read",
    with_a_log_of_zeros: "metrics.csv is damaged",
    with_other_data: "the data have changed since",
    of_another_format: "its format is 2, not 1",
    of_another_model: "its weights have other names or shapes",
    of_lightning_alone: "can't be read",
    with_code: "can't be read",
    with_a_log_that_lost_its_end: "metrics.csv is shorter than it was",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_checkpoint_of_no_use_is_set_aside_and_the_trial_starts_anew(
    undisturbed: dict[str, Any], stopped: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    damage(stopped)
    bytes_before = resume.last(stopped).read_bytes()
    capfd.readouterr()
    assert run(stopped) == 0
    aside = stopped / "checkpoints" / "last.ckpt.damaged"
    said = capfd.readouterr().out
    assert f"{aside}: set aside, since" in said and DAMAGE[damage] in said
    assert aside.read_bytes() == bytes_before
    assert not (stopped / "executed").exists()
    assert outcome(stopped) == undisturbed


def test_a_checkpoint_of_another_configuration_is_set_aside(stopped: Path, plugin: Path) -> None:
    config = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(config.replace("seed: 5", "seed: 6"))
    assert run(stopped) == 0
    assert (stopped / "checkpoints" / "last.ckpt.damaged").exists()


def test_what_a_trial_went_on_from_is_stamped_and_its_seconds_count(stopped: Path) -> None:
    before, seconds = read(stopped, "stamp.json"), read(stopped, "status.json")["seconds"]
    assert run(stopped) == 0
    stamp = read(stopped, "stamp.json")
    (again,) = stamp.pop("resumed")
    assert stamp == before
    assert again["step"] == 7 and set(again) == {"step", *before}
    assert read(stopped, "result.json")["seconds"] > seconds


def test_a_full_disk_leaves_the_checkpoint_before(
    undisturbed: dict[str, Any], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resume.last(stopped).read_bytes()

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resume.torch, "save", full)
        assert run(stopped) == 1
    assert read(stopped, "status.json")["status"] == "disk full"
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["last.ckpt"]
    assert resume.last(stopped).read_bytes() == before
    assert run(stopped) == 0
    assert outcome(stopped) == undisturbed


def test_a_disk_too_full_for_the_status_is_told_by_the_exit_code(
    undisturbed: dict[str, Any], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, space = Path.write_bytes, True

    def write_if_there_is_space(path: Path, *args: Any, **kwargs: Any) -> Any:
        if not space:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    def save(*_: Any) -> None:
        nonlocal space
        space = False
        raise OSError(28, "No space left on device")

    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_if_there_is_space)
        patch.setattr(resume.torch, "save", save)
        patch.setattr("sys.stderr", Full())
        code = run(stopped)
    assert code == DISK_FULL
    assert run(stopped) == 0
    assert outcome(stopped) == undisturbed


@pytest.mark.parametrize("steps", [11, 12])  # the last with a validation of its own, or as one of the regular ones
def test_a_trial_killed_before_it_wrote_its_result_trains_no_step_again(
    plugin: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], steps: int
) -> None:
    folder = trial(tmp_path / "trial", plugin, max_steps=steps)
    assert run(folder) == 0
    want = outcome(folder)
    (folder / "result.json").unlink()
    (folder / "status.json").write_text('{"status": "running"}')
    capfd.readouterr()
    assert run(folder) == 0
    assert capfd.readouterr().out == f"going on from step {steps}\n"
    assert outcome(folder) == want
    status = read(folder, "status.json")
    assert (status["step"], status["loss"]) == (steps, want["curves"]["train/loss"][steps])


def test_a_second_sigterm_does_not_break_the_save_off_but_a_second_sigint_does() -> None:
    interruption = Interruption()
    with interruption.deferred():
        interruption._handle(signal.SIGTERM, None)
        interruption._handle(signal.SIGTERM, None)
        assert interruption.asked == "SIGTERM"
        with pytest.raises(Interrupted, match="SIGTERM"):
            interruption._handle(signal.SIGINT, None)
        interruption._handle(signal.SIGINT, None)  # while it clears up


def test_no_link_is_followed_out_of_the_folder(undisturbed: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("metrics.csv", "tensorboard", "checkpoints"):
        (stopped / name).rename(outside / name)
        (stopped / name).symlink_to(outside / name)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    assert run(stopped) == 0
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before
    assert outcome(stopped) == undisturbed


def test_a_folder_in_place_of_a_file_is_set_aside(undisturbed: dict[str, Any], plugin: Path, tmp_path: Path) -> None:
    folder = trial(tmp_path / "trial", plugin)
    for name in ("metrics.csv", "stamp.json", "result.json"):
        (folder / name / "kept").mkdir(parents=True)
    assert run(folder) == 0
    assert outcome(folder) == undisturbed and len(list(folder.glob("*.damaged/kept"))) == 3


def test_events_stand_in_order_though_the_clock_went_back(
    undisturbed: dict[str, Any], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time.time", lambda: now() - 3600)
    assert run(stopped) == 0
    monkeypatch.undo()
    assert outcome(stopped) == undisturbed


def test_a_trial_whose_time_is_up_saves_and_goes_on_when_it_is_asked_to(
    undisturbed: dict[str, Any], plugin: Path, tmp_path: Path
) -> None:
    folder = trial(tmp_path / "trial", plugin, max_time=1e-6)
    steps = []
    while run(folder) == 1:  # a step in each go
        status = read(folder, "status.json")
        steps.append(status["step"])
        assert status["status"] == "out of time"
        assert status["reason"] == f"1e-06 s were over at step {status['step']} of 11"
        if status["step"] == 3:
            config = (folder / "config.yaml").read_text()
            (folder / "config.yaml").write_text(config.replace("max_time: 1.0e-06", "max_time: null"))
    assert steps == [1, 2, 3]
    assert outcome(folder) == undisturbed
