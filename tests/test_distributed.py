"""Two processes, over gloo, train as one does; and when one of them ends, so does the trial."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

import gla_ablate
from gla_ablate import distributed
from gla_ablate.checkpoint import last, read_checkpoint
from gla_ablate.cli import main
from gla_ablate.config import TrainerConfig, resolve, write_config
from gla_ablate.data import source
from gla_ablate.data.module import DataModule
from gla_ablate.distributed import check_devices
from gla_ablate.errors import ConfigError
from gla_ablate.model import build_model
from gla_ablate.ranks import Rank, first_node, own_rank
from gla_ablate.resume import KEY
from gla_ablate.sharding import shares_weights
from gla_ablate.status import read_json
from tests.registries import one_of_each_kind, scratch_registries
from tests.test_trial import CURVES_OF_TIME, logged, read
from tests.test_trial import run as run_here

# A gate that, at a call of one process, does what GLA_TEST_DOES says, "what@rank@call"; and a task with as many targets
# a row as its number in the data says, from none on, so that processes have different numbers of them.
PLUGIN = """
import os
import signal
import numpy
import torch
from gla_ablate.data.drawn import Examples
from gla_ablate.data.mqar import Mqar
from gla_ablate.data.source import DATA
from gla_ablate.model import Gate, GateShape, register_gate

@register_gate("doing")
class Doing(Gate):
    decay_shape = "[B,T,H]"

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.proj, self.calls = torch.nn.Linear(shape.dim, shape.heads), 0

    def forward(self, x):
        self.calls += 1
        what, rank, call = os.environ.get("GLA_TEST_DOES", "nothing@0@0").split("@")
        several = torch.distributed.is_initialized()
        if self.calls == int(call) and several and torch.distributed.get_rank() == int(rank):
            if what == "raise":
                raise RuntimeError("of process 1 alone")
            os.kill(os.getpid(), signal.Signals[what])
        return torch.nn.functional.logsigmoid(self.proj(x)) / 16

@DATA.register("uneven")
class Uneven(Mqar):
    def _draw(self, split: str, count: int) -> Examples:
        rows = super()._draw(split, count)
        for i in range(count):
            rows.targets[i, numpy.flatnonzero(rows.targets[i] >= 0)[i % 4 :]] = -100
        return rows
"""
DATA = {"name": "uneven", "seq_len": 16, "batch_size": 4, "vocab_size": 32, "pairs": 3, "train_examples": 64}
DATA |= {"val_tokens": 13 * 16}  # rows: of the last batch one process has none
MODEL = {"dim": 16, "layers": 2, "heads": 2, "chunk_size": 16, "gate": {"name": "doing"}}
TRAINER = {"max_steps": 7, "val_every": 3, "log_every": 1, "precision": "32-true"}
OPTIM = {"lr": 1e-3}
EVAL = {"lengths": [1, 3]}  # 13 rows of 16 tokens, of the last batch of which one process has none; 4 rows of 48
ENDS = 60.0  # seconds in which a trial has to have ended


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("plugin") / "doing.py"
    path.write_text(PLUGIN)
    with scratch_registries() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        threads = torch.get_num_threads()
        yield path
        torch.set_num_threads(threads)  # which a trial on several devices has divided


@pytest.fixture(scope="module", autouse=True)
def two_or_no_gpus() -> Iterator[None]:
    """One can't be shared."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() == 1:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that are started
        yield


def run(folder: Path) -> int:
    """The trial in `folder`, in this process; in one of its own on GPUs: there PyTorch 2.11 breaks off where a process
    divides a second group, and a trial's ends where NCCL waits for another that is gone."""
    if not torch.cuda.is_available():
        return run_here(folder)
    return subprocess.run([sys.executable, "-m", "gla_ablate.trial", str(folder)], check=False).returncode


def trial(folder: Path, plugin: Path, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"model": MODEL, "data": DATA, "optim": OPTIM, "trainer": TRAINER | trainer, "plugins": [str(plugin)]}
    parts["eval"] = EVAL
    write_config(resolve(parts), folder / "config.yaml")
    return folder


def curves(folder: Path) -> dict[tuple[str, int], float]:
    """(metric, step) → value, without times; fails where a step is logged twice."""
    return {key: value for key, value in logged(folder).items() if key[0] not in CURVES_OF_TIME}


@pytest.fixture(scope="module")
def alone(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trial(tmp_path_factory.mktemp("alone"), plugin)
    assert run(folder) == 0
    return folder


@pytest.fixture(scope="module")
def fsdp(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trial(tmp_path_factory.mktemp("fsdp"), plugin, devices=2, strategy="fsdp")
    assert run(folder) == 0
    return folder


@pytest.fixture(scope="module")
def ddp(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trial(tmp_path_factory.mktemp("ddp"), plugin, devices=2)
    assert run(folder) == 0
    return folder


def test_some_process_of_some_step_has_no_target(plugin: Path) -> None:
    """Else the tests below would say less than they seem to."""
    config = resolve({"data": DATA, "model": MODEL, "plugins": [str(plugin)]})
    counts = []
    for rank in range(2):
        batches = iter(DataModule(config.data, config.seed, rank=rank, world=2).train_dataloader())
        counts.append([int((next(batches)["targets"] >= 0).sum()) for _ in range(TRAINER["max_steps"])])
    assert 0 in itertools.chain(*counts) and counts[0] != counts[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_curves_of_one(strategy: str, alone: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(strategy)
    one, two = curves(alone), curves(folder)
    assert list(two) == list(one)
    assert {("train/loss", 7), ("train/grad_norm", 7), ("val/loss", 3), ("val/loss", 7)} <= two.keys()
    assert {("eval/loss_at_3x", 7), ("eval/accuracy_at_1x", 7)} <= two.keys()
    by_position = [pandas.read_csv(f / "positions.csv") for f in (alone, folder)]
    pandas.testing.assert_frame_equal(*by_position, rtol=1e-5)
    assert by_position[0].groupby("multiple")["tokens"].sum().to_dict() == {1: 18, 3: 6}
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    result, single = read(folder, "result.json"), read(alone, "result.json")
    assert (result["devices"], result["strategy"]) == (2, strategy)
    assert result["device"].startswith("2 × ")
    assert result["tokens"] == single["tokens"] == 7 * 4 * 16
    assert read(folder, "stamp.json")["strategy"] == strategy


@pytest.mark.parametrize("strategy, recompute", [("ddp", "elementwise"), ("fsdp", "block")])
def test_shares_in_micro_batches_have_the_curves_of_one(
    strategy: str, recompute: str, alone: Path, plugin: Path, tmp_path: Path
) -> None:
    """One row each, some without a target."""
    folder = trial(tmp_path / "parts", plugin, devices=2, strategy=strategy, accumulate=2, recompute=recompute)
    assert run(folder) == 0
    one, two = curves(alone), curves(folder)
    assert list(two) == list(one)
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_is_as_of_one_device(strategy: str, alone: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(strategy)
    one, two = read_checkpoint(last(alone)), read_checkpoint(last(folder))
    assert two.keys() == one.keys()
    assert two["optimizer_states"][0]["param_groups"] == one["optimizer_states"][0]["param_groups"]
    for number, state in one["optimizer_states"][0]["state"].items():
        for name, x in state.items():
            torch.testing.assert_close(two["optimizer_states"][0]["state"][number][name], x, rtol=1e-3, atol=1e-6)
    tokens = torch.arange(32).reshape(2, 16)
    logits, wanted = gla_ablate.load(folder)(tokens), gla_ablate.load(alone)(tokens)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    own = two["callbacks"][KEY]
    assert len(own["others"]) == 1 and not torch.equal(own["others"][0]["torch"], own["generators"]["torch"])


@pytest.fixture(scope="module")
def interrupted(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under FSDP, by a SIGTERM that only the other process gets, in step 5."""
    folder = trial(tmp_path_factory.mktemp("interrupted"), plugin, devices=2, strategy="fsdp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_TEST_DOES", "SIGTERM@1@9")  # after 3 steps and 4 batches of validation, in the second step
        assert run(folder) == 130
    return folder


def test_a_signal_to_any_process_interrupts_the_trial_with_its_work_saved(interrupted: Path) -> None:
    status = read(interrupted, "status.json")
    assert (status["status"], status["reason"], status["step"]) == ("interrupted", "by SIGTERM at step 5", 5)
    assert read_checkpoint(last(interrupted))["global_step"] == 5


def test_interrupted_under_fsdp_it_goes_on_to_the_same_bits(interrupted: Path, fsdp: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "on")
    assert run(folder) == 0
    assert curves(folder) == curves(fsdp)
    mine, undisturbed = (read_checkpoint(last(x))["state_dict"] for x in (folder, fsdp))
    assert all(torch.equal(x, undisturbed[name]) for name, x in mine.items())


@pytest.mark.parametrize("trainer", [{}, {"devices": 2}])
def test_it_goes_on_with_another_number_of_devices_or_strategy(
    interrupted: Path, alone: Path, plugin: Path, tmp_path: Path, trainer: dict[str, Any]
) -> None:
    folder = trial(shutil.copytree(interrupted, tmp_path / "on"), plugin, **trainer)
    assert run(folder) == 0
    assert read(folder, "stamp.json")["resumed"][0]["step"] == 5
    one, now = curves(alone), curves(folder)
    assert list(now) == list(one)
    for key, value in one.items():
        assert now[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def left_of(folder: Path) -> list[str]:
    """Processes of the trial in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if str(folder) in words and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(" ".join(words))
        except OSError:  # has ended
            continue
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize(
    ("does", "status", "reason"),
    [
        ("raise", "failed", "RuntimeError: of process 1 alone"),
        ("SIGKILL", "killed", "process 1 of 2 by signal 9 (SIGKILL)"),
    ],
)
def test_a_process_that_ends_ends_the_trial(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, status: str, reason: str
) -> None:
    folder = trial(tmp_path / "trial", plugin, devices=2)
    monkeypatch.setenv("GLA_TEST_DOES", f"{does}@1@2")
    began = time.monotonic()
    assert run(folder) == 1
    assert time.monotonic() - began < ENDS
    found = read(folder, "status.json")
    assert (found["status"], found["reason"]) == (status, reason)
    assert not (folder / "result.json").exists() and not left_of(folder)


def test_what_all_processes_end_of_is_told_as_of_one(plugin: Path, tmp_path: Path) -> None:
    folder = trial(tmp_path / "trial", plugin, devices=2, max_time=1e-6)
    assert run(folder) == 1
    status = read(folder, "status.json")
    assert (status["status"], status["reason"]) == ("out of time", "1e-06 s were over at step 1 of 7")
    assert read_checkpoint(last(folder))["global_step"] == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_killed_the_first_process_takes_the_other_with_it(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trial(tmp_path / "trial", plugin, devices=2, max_steps=100_000, val_every=100_000)
    with subprocess.Popen([sys.executable, "-m", "gla_ablate.trial", str(folder)]) as process:
        try:
            deadline = time.monotonic() + ENDS
            while (read_json(folder / "status.json") or {}).get("step", 0) < 2:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            assert len(left_of(folder)) == 2
        finally:
            process.kill()
    deadline = time.monotonic() + ENDS
    while left_of(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_torchrun_starts_the_processes(alone: Path, plugin: Path, tmp_path: Path) -> None:
    folder = trial(tmp_path / "trial", plugin, devices=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "gla_ablate.trial", str(folder)], timeout=ENDS, check=False)
    assert done.returncode == 0
    one, two = curves(alone), curves(folder)
    assert list(two) == list(one)
    assert two["val/loss", 7] == pytest.approx(one["val/loss", 7], rel=1e-5)


def a_gpu_each(i: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": i} if torch.cuda.device_count() > 1 else {}


def test_srun_starts_the_processes(alone: Path, plugin: Path, tmp_path: Path) -> None:
    """As far as its environment tells, with two nodes of a process each that are this one."""
    folder = trial(tmp_path / "trial", plugin, num_nodes=2)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "gla_ablate.trial", str(folder)],
            env={**os.environ, **step, "SLURM_PROCID": i, "SLURM_NODEID": i, **a_gpu_each(i)},
        )
        for i in "01"
    ]
    try:
        assert [task.wait(ENDS) for task in tasks] == [0, 0]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    one, two = curves(alone), curves(folder)
    assert two["val/loss", 7] == pytest.approx(one["val/loss", 7], rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "rows", "message"),
    [
        (
            {"devices": 4},
            6,
            r"data.batch_size: got 6, which 4 devices .*a multiple of 4, such as 8, .*such as 3",
        ),
        ({"devices": 2, "num_nodes": 3}, 4, r"data.batch_size: got 4, which 6 devices"),
        ({"devices": 0}, 4, r"trainer.devices: got 0, takes a whole number from 1"),
        ({"num_nodes": -1}, 4, r"trainer.num_nodes: got -1, takes a whole number from 1"),
        ({"strategy": "deepspeed"}, 4, r"trainer.strategy: got 'deepspeed'"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_the_fix(trainer: dict[str, Any], rows: int, message: str) -> None:
    data = {"name": "mqar", "seq_len": 16, "batch_size": rows, "pairs": 3, "vocab_size": 32}
    with pytest.raises(ConfigError, match=message):
        resolve({"data": data, "trainer": trainer})


def test_devices_and_processes_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    four = Rank(0, 4, 0, 0, "localhost", 1, "torchrun", True)
    with pytest.raises(ConfigError, match=r"trainer.devices: got 2 .* but torchrun started 4 processes"):
        check_devices(TrainerConfig(devices=2), four)
    check_devices(TrainerConfig(devices=2, num_nodes=2), four)
    with pytest.raises(ConfigError, match=r"trainer.num_nodes: got 2, takes a start by torchrun or srun"):
        check_devices(TrainerConfig(num_nodes=2), None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"trainer.devices: got 4, takes at most 2, the GPUs"):
        check_devices(TrainerConfig(devices=4), None)


def test_several_nodes_are_for_others_to_start_from_folders_that_are_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nodes.yaml").write_text(
        "name: nodes\nset: {trainer: {num_nodes: 2, max_steps: 3}, data.name: mqar}\nseeds: [0, 1]\n"
    )
    command = [str(tmp_path / "nodes.yaml"), "--out", str(tmp_path / "runs")]
    assert main(command) == 2
    assert "trainer.num_nodes: got 2, but run.py starts a trial on one node; --prepare" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main([*command, "--prepare"]) == 0
    folders = capsys.readouterr().out.split()
    assert len(folders) == 2 and all((Path(folder) / "config.yaml").is_file() for folder in folders)


def test_a_process_knows_its_rank() -> None:
    beside = Rank(1, 4, 1, 0, "127.0.0.1", 5000, "rank 0", True)
    assert own_rank(lambda: 4, {"GLA_ABLATE_RANK": str(beside)}) == beside
    elastic = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "8"}
    elastic |= {"MASTER_ADDR": "a", "MASTER_PORT": "7", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert own_rank(lambda: 8, elastic) == Rank(5, 8, 1, 1, "a", 7, "torchrun", True)
    job = {"SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    step = job | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    assert own_rank(lambda: 16, step) == Rank(9, 16, 1, 1, "gpu07", 19567, "srun", False)
    assert own_rank(lambda: 1, step) is None  # a trial on one device in a job that has room for more
    assert own_rank(lambda: 16, job) is None  # outside of a step: in a batch script
    assert own_rank(lambda: 16, step | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert own_rank(lambda: 2, {}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu1", "gpu1"), ("gpu[3,5-7]", "gpu3"), ("gpu[07-12],login1", "gpu07"), ("a,b", "a"), ("rack[1]", "rack1")],
)
def test_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize("rows", [1, 2, 3, 13, 16])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_validation_reads_each_row_once_in_equally_many_batches(rows: int, world: int) -> None:
    data = {"name": "mqar", "seq_len": 16, "batch_size": 8, "vocab_size": 32, "pairs": 3, "val_tokens": 16 * rows}
    config = resolve({"data": data})
    batches = [list(DataModule(config.data, 0, rank=i, world=world).val_dataloader()) for i in range(world)]
    whole = DataModule(config.data, 0).source.val[list(range(rows))]["inputs"]
    assert len({len(own) for own in batches}) == 1
    assert any("filler" not in batch for batch in batches[0])
    read = [batch["inputs"] for own in zip(*batches, strict=True) for batch in own if "filler" not in batch]
    assert torch.equal(torch.cat(read), whole)
    for batch in itertools.chain(*batches):
        assert "filler" not in batch or (len(batch["inputs"]) == 1 and (batch["targets"] == source.IGNORED).all())


def test_ranks_share_a_training_batch() -> None:
    data = {"name": "mqar", "seq_len": 16, "batch_size": 8, "vocab_size": 32, "pairs": 3, "train_examples": 64}
    config = resolve({"data": data})
    whole = next(iter(DataModule(config.data, 3, start_step=5).train_dataloader()))
    parts = [next(iter(DataModule(config.data, 3, start_step=5, rank=i, world=4).train_dataloader())) for i in range(4)]
    for name in ("inputs", "targets"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
        assert {len(part[name]) for part in parts} == {2}


@pytest.mark.parametrize("name", one_of_each_kind())
@pytest.mark.parametrize("mixer", ["gla", ["gla", "softmax"]])
def test_every_parameter_has_a_gradient_in_every_step(name: str, mixer: Any) -> None:
    """DDP waits for all of them."""
    model = build_model(resolve({"model": MODEL | {"gate": {"name": name}, "mixer": mixer}}).model, 32)
    model(torch.arange(32).reshape(2, 16)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_weights_that_blocks_share_are_found() -> None:
    model = build_model(resolve({"model": MODEL | {"gate": {"name": "data_dependent"}}}).model, 32)
    assert not shares_weights(model)
    model.blocks[1].mixer.gate = model.blocks[0].mixer.gate
    assert shares_weights(model)


def test_of_one_process_nothing_is_asked_of_others() -> None:
    group = distributed.Group()
    assert group.all("x") == ["x"] and group.from_first(3) == 3 and group.largest(1, 2.5) == [1, 2.5]
    loss = torch.tensor(2.0)
    assert distributed.share_of_mean(loss, 3) is loss and distributed.total(loss) is loss
