from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from gla_ablate import fit, trial
from gla_ablate.config import read_config, resolve, write_config
from gla_ablate.data.drawn import Examples
from gla_ablate.data.module import DataModule
from gla_ablate.errors import ConfigError
from gla_ablate.model import count_parameters, flops_per_token, state_size
from gla_ablate.module import AblationModule
from tests.registries import one_of_each_kind

MQAR = {"name": "mqar", "seq_len": 16, "batch_size": 4, "vocab_size": 32, "pairs": 3, "train_examples": 64}
MQAR |= {"val_tokens": 160}
MODEL = {"dim": 32, "layers": 2, "heads": 2, "chunk_size": 16}
TRAINER = {"max_steps": 7, "val_every": 3, "log_every": 2, "precision": "32-true"}
CURVES_OF_TIME = ("train/tokens_per_s", "train/data_wait_ms", "train/mfu")  # that no two runs share


def folder_for(path: Path, **parts) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    values = {"model": MODEL, "data": MQAR, "trainer": TRAINER} | parts
    write_config(resolve(values), path / "config.yaml")
    return path


def run(folder: Path) -> int:
    """`trial.main` in this process, which keeps its own signal handlers. Event files are counted from 0, as in a
    process of its own: the count is part of their names, which TensorBoard sorts as text."""
    event_file_writer._global_uid = type(event_file_writer._global_uid)(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = set(threading.enumerate())
    try:
        return trial.main([str(folder)])
    finally:
        assert {thread for thread in threading.enumerate() if thread.name == "reading ahead"} <= before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """(metric, step) → value, in the order of the log; fails when a metric has a step twice."""
    found: dict[tuple[str, int], float] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["metric"], int(row["step"])
            assert key not in found, row
            found[key] = float(row["value"])
    return found


def metrics(folder: Path) -> dict[str, dict[int, float]]:
    """Metric → step → value; fails when a metric has a step twice."""
    found: dict[str, dict[int, float]] = {}
    for (metric, step), value in logged(folder).items():
        found.setdefault(metric, {})[step] = value
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a trial on text that ran to its end, over the remains of an earlier attempt."""
    base = tmp_path_factory.mktemp("finished")
    (base / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    (base / "val.txt").write_text("pack my box with five dozen liquor jugs. " * 20)
    data = {"name": "text", "seq_len": 32, "batch_size": 4, "val_tokens": 320}
    data |= {"files": [str(base / "text.txt")], "val_files": [str(base / "val.txt")]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_ABLATE_CACHE", str(base / "cache"))
        folder = folder_for(base / "trial", data=data, seed=3)
        (folder / "status.json").write_text('{"status": "interrupted"}')
        (folder / "result.json").write_text("{}")
        (folder / "metrics.csv").write_text("step,metric,value\n1,stale,1.0\n")
        for name, file in (
            ("tensorboard", "events.stale"),
            ("checkpoints", "last.ckpt"),
            ("checkpoints", ".last.ckpt.7"),
        ):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / file).write_text("")
        assert run(folder) == 0
        yield folder


def test_finished_trial_has_the_files_of_the_contract_and_nothing_of_the_attempt_before(finished):
    changes = read(finished, "stamp.json")["git"]["diff"]  # of a checkout that isn't as it was committed
    files = {path.name for path in finished.iterdir()}
    assert files - {changes} == {
        "config.yaml",
        "stamp.json",
        "status.json",
        "metrics.csv",
        "result.json",
        "checkpoints",
        "tensorboard",
        "trial.lock",
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"last.ckpt", "last.ckpt.damaged"}
    assert "stale" not in metrics(finished)
    assert not (finished / "tensorboard" / "events.stale").exists()


def test_curves_stand_at_the_steps_done_and_validation_also_at_the_end(finished):
    curves = metrics(finished)
    on_gpu = ["train/mfu"] * torch.cuda.is_available()
    for tag in ("train/loss", "train/grad_norm", "lr", "train/tokens_per_s", "train/data_wait_ms", *on_gpu):
        assert list(curves[tag]) == [2, 4, 6, 7], tag
    assert all(0 < value < 1 for value in curves.get("train/mfu", {}).values())
    gates = [f"gate/layer{i}/head{j}/{what}" for i in range(2) for j in range(2) for what in ("forget", "memory")]
    for tag in ("val/loss", "val/ppl", "val/bpb", *gates):
        assert list(curves[tag]) == [3, 6, 7], tag
    assert list(curves["hp/loss"].items()) == [(7, curves["val/loss"][7])]
    assert list(curves["hp/bpb"].items()) == [(7, curves["val/bpb"][7])]
    assert all(math.isfinite(value) for curve in curves.values() for value in curve.values())


def test_status_tells_how_it_ended(finished):
    status = read(finished, "status.json")
    assert status["status"] == "finished"
    assert (status["step"], status["max_steps"], status["reason"]) == (7, 7, None)
    assert status["loss"] == metrics(finished)["train/loss"][7]
    assert status["tokens_per_s"] > 0
    assert status["seconds"] > 0
    assert status["pid"] == os.getpid()
    assert status["started"] <= status["updated"]
    assert status["started"].endswith("+00:00")


def test_result_holds_the_last_metrics_and_the_costs(finished):
    result, config = read(finished, "result.json"), read_config(finished / "config.yaml")
    assert result["metrics"] == {tag: list(curve.values())[-1] for tag, curve in metrics(finished).items()}
    assert result["steps"] == 7
    assert result["tokens"] == 7 * 4 * 32
    assert result["params"] == count_parameters(config.model, 256)
    assert result["state_size"] == state_size(config.model)
    assert result["flops_per_token"] == flops_per_token(config.model, 256, 32)
    assert result["tokens_per_s"] > 0
    assert result["peak_mem_mb"] > 0
    assert result["backend"] == ("triton" if torch.cuda.is_available() else "torch")
    assert result["data"]["name"] == "text"
    assert result["data"] == read(finished, "stamp.json")["data"]


def test_utilisation_is_of_the_operations_that_a_trial_needs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fit, "peak_flops", lambda precision, device: asked.append(precision) or 1e12)
    folder = folder_for(tmp_path / "trial", data=MQAR, trainer={"max_steps": 4, "log_every": 2, "precision": "32-true"})
    assert run(folder) == 0
    result, curves = read(folder, "result.json"), metrics(folder)
    model = read_config(folder / "config.yaml").model
    cost = flops_per_token(model, MQAR["vocab_size"], MQAR["seq_len"], labelled_share=MQAR["pairs"] / MQAR["seq_len"])
    assert asked == ["32-true"] and result["flops_per_token"] == cost
    speeds = curves["train/tokens_per_s"]
    assert curves["train/mfu"] == pytest.approx({step: cost * speed / 1e12 for step, speed in speeds.items()})
    assert result["mfu"] == pytest.approx(cost * result["tokens_per_s"] / 1e12)


def test_stamp_tells_the_code_and_the_machine(finished):
    stamp = read(finished, "stamp.json")
    assert set(stamp) == {"git", "versions", "device", "machine", "backend", "precision", "data", "command"} | {
        "plugin",
        "folder",
    }
    assert set(stamp["git"]) == {"sha", "dirty", "diff"} and set(stamp["machine"]) == {"host", "driver", "threads"}
    assert stamp["git"]["diff"] is None or stamp["git"]["dirty"]
    assert stamp["versions"]["torch"] == torch.__version__
    assert stamp["command"]


def test_checkpoint_loads_without_code_and_gives_the_recorded_loss(finished):
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    config = read_config(finished / "config.yaml")
    assert checkpoint["global_step"] == 7
    assert checkpoint["config"]["model"] == vars(config.model)
    module = AblationModule(config)
    module.load_state_dict(checkpoint["state_dict"])
    rows = DataModule(config.data, config.seed).source.val
    batch = rows[list(range(len(rows)))]
    with torch.no_grad():
        loss = module.training_step(batch, 0).item()
    assert loss == pytest.approx(read(finished, "result.json")["metrics"]["val/loss"], rel=1e-4)


def test_tensorboard_shows_each_curve_once_and_the_hyperparameters(finished):
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    curves = metrics(finished)
    assert set(events.Tags()["scalars"]) == set(curves)
    for tag, curve in curves.items():
        points = events.Scalars(tag)
        assert [point.step for point in points] == list(curve), tag
        assert [point.value for point in points] == pytest.approx(list(curve.values()), rel=1e-6), tag
    assert "gate/layer1/head0/forget_histogram" in events.Tags()["histograms"]
    assert b"model.gate" in events.PluginTagToContent("hparams")["_hparams_/session_start_info"]


def test_finished_trial_is_left_alone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "trial.lock"}
    assert run(finished) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_same_config_gives_the_same_curves(finished, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert run(again) == 0
    first, second = metrics(finished), metrics(again)
    for tag in ("train/loss", "val/loss", "gate/layer0/head0/forget"):
        assert first[tag] == pytest.approx(second[tag], rel=1e-4 if torch.cuda.is_available() else 0, abs=0), tag


@pytest.mark.parametrize("name", one_of_each_kind())
def test_trial_on_recall_ends_with_an_accuracy_for_every_kind_of_gate(name, tmp_path):
    folder = folder_for(tmp_path, model=MODEL | {"gate": {"name": name}}, trainer=TRAINER | {"val_every": 100})
    assert run(folder) == 0
    curves = metrics(folder)
    assert list(curves["val/accuracy"]) == list(curves["hp/accuracy"]) == [7]
    assert "val/bpb" not in curves


@pytest.fixture
def failing(tmp_path, scratch_registry) -> Path:
    """A plugin whose gate fails in its third call, a training step, as its option says."""
    path = tmp_path / "failing.py"
    path.write_text("""
import torch
from gla_ablate.model import Gate, GateShape, register_gate

@register_gate("failing")
class Failing(Gate):
    decay_shape = "[H]"

    def __init__(self, shape: GateShape, *, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.heads = how, 0, shape.heads

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            if self.how == "raise":
                raise RuntimeError("a line\\nand another")
            if self.how == "host memory":
                torch.empty(1 << 60, dtype=torch.uint8)
            if self.how == "python memory":
                raise MemoryError
            if self.how == "device memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.full((self.heads,), float("nan"), device=x.device)
        return torch.full((self.heads,), -0.1, device=x.device)
""")
    return path


OF = r"\d+\.\d of \d+\.\d GiB"
HELD = rf"the process held up to {OF}"
LESS = re.escape(trial.LESS_MEMORY)


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("nan", "diverged", "loss is nan at step 3"),
        ("raise", "failed", "RuntimeError: a line and another"),
        ("host memory", "out of memory", rf"on the host after step 2: {HELD}; {LESS}"),
        ("python memory", "out of memory", rf"on the host after step 2: {HELD}; {LESS}"),
        (
            "device memory",
            "out of memory",
            rf"on the GPU after step 2(: PyTorch held up to {OF})?; {LESS}",
        ),
    ],
)
def test_failure_is_told_in_a_line_and_leaves_no_result(failing, tmp_path, capfd, how, kind, reason):
    model = MODEL | {"layers": 1, "gate": {"name": "failing", "how": how}}
    trainer = TRAINER | {"val_every": 100, "log_every": 5}
    folder = folder_for(tmp_path / "trial", model=model, trainer=trainer, plugins=[str(failing)])
    assert run(folder) == 1
    status = read(folder, "status.json")
    assert status["status"] == kind
    assert re.fullmatch(reason, status["reason"]) and len(status["reason"]) <= 200
    assert not (folder / "result.json").exists()
    assert "Traceback" in capfd.readouterr().err


def test_a_full_gpu_is_told_with_what_pytorch_held_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(78.25 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=79.2 * 2**30))
    kind, reason = trial.failure(torch.OutOfMemoryError("CUDA out of memory"), 123_456_789)
    assert kind == "out of memory"
    held = "PyTorch held up to 78.2 of 79.2 GiB"
    assert reason == f"on the GPU after step 123456789: {held}; {trial.LESS_MEMORY}" and len(reason) <= 200


def test_data_that_cannot_be_read_fail_the_trial_with_their_own_message(tmp_path, monkeypatch):
    real = Examples.__getitem__
    seen = []

    def read_rows(self, rows):
        seen.append(rows)
        if len(seen) == 5:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, rows)

    monkeypatch.setattr(Examples, "__getitem__", read_rows)
    folder = folder_for(tmp_path)
    assert run(folder) == 1
    status = read(folder, "status.json")
    assert (status["status"], status["reason"]) == ("failed", "OSError: [Errno 5] Input/output error")


def test_last_step_that_breaks_the_weights_is_a_failure(tmp_path):
    """Its own loss is finite: only the validation after it shows the damage."""
    folder = folder_for(tmp_path, optim={"lr": 1e38, "warmup_steps": 0}, trainer=TRAINER | {"max_steps": 1})
    assert run(folder) == 1
    status = read(folder, "status.json")
    assert (status["status"], status["reason"]) == ("diverged", "val/loss is nan at step 1")


def test_backend_that_the_machine_lacks_is_told_by_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("gla_ablate.ops.op.interpreted", lambda: False)
    folder = folder_for(tmp_path, model=MODEL | {"backend": "triton"})
    assert run(folder) == 1
    assert read(folder, "status.json")["reason"].startswith("model.backend: got 'triton'")


def test_second_process_on_a_trial_is_turned_away(tmp_path, capsys):
    folder = folder_for(tmp_path)
    with FileLock(folder / "trial.lock"):
        assert run(folder) == 1
    assert "another process is running this trial" in capsys.readouterr().err
    assert not (folder / "status.json").exists()


@pytest.mark.parametrize("arguments", [[], ["no/such/folder"], ["a", "b"]])
def test_folder_without_a_trial_is_a_usage_error(arguments, capsys):
    assert trial.main(arguments) == 2
    assert capsys.readouterr().err


def wait_for(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def step_of(folder: Path) -> int:
    status = folder / "status.json"
    return read(folder, "status.json")["step"] if status.exists() else 0


ENDLESS = TRAINER | {"max_steps": 1_000_000, "val_every": 1_000_000}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_interrupts_a_trial(tmp_path, number):
    folder = folder_for(tmp_path, trainer=ENDLESS)
    with subprocess.Popen([sys.executable, "-m", "gla_ablate.trial", str(folder)]) as process:
        try:
            wait_for(lambda: step_of(folder) >= ENDLESS["log_every"])
            process.send_signal(number)
            assert process.wait(30) == 130
        finally:
            process.kill()
    status = read(folder, "status.json")
    assert status["status"] == "interrupted"
    assert status["reason"] == f"by {number.name} at step {status['step']}"
    assert not (folder / "result.json").exists()
    assert metrics(folder)["train/loss"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_trial_ends_when_its_parent_is_killed(tmp_path):
    folder = folder_for(tmp_path, trainer=ENDLESS)
    parent = f"""
import os, subprocess, sys
os.environ["GLA_ABLATE_PARENT"] = str(os.getpid())
subprocess.run([sys.executable, "-m", "gla_ablate.trial", {str(folder)!r}])
"""
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        try:
            wait_for(lambda: step_of(folder) > 0)
        finally:
            process.kill()
    wait_for(lambda: read(folder, "status.json")["status"] == "interrupted")


def test_precision_follows_the_device(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    for has_bf16, automatic in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert fit.resolve_precision("auto", gpu) == automatic
        assert fit.resolve_precision("auto", cpu) == "32-true"
        assert fit.resolve_precision("32-true", gpu) == "32-true"
    for given in ("bf16-mixed", "bf16-true"):
        assert fit.resolve_precision(given, cpu) == given
        with pytest.raises(
            ConfigError, match=rf"trainer.precision: got '{given}', which an old GPU doesn't compute in"
        ):
            fit.resolve_precision(given, gpu)


def test_trial_in_bf16_keeps_its_weights_in_fp32(tmp_path):
    folder = folder_for(tmp_path, trainer=TRAINER | {"precision": "bf16-mixed"})
    assert run(folder) == 0
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert read(folder, "stamp.json")["precision"] == "bf16-mixed"
