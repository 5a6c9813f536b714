from __future__ import annotations

import math
import random
from dataclasses import replace

import lightning as L
import numpy
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import Tensor, nn

from gla_ablate.config import Config, ModelConfig
from gla_ablate.data.module import DataModule
from gla_ablate.gate_statistics import GateStatistics, by_head, memory_length, tried
from gla_ablate.hparams import flat_hparams
from gla_ablate.model import GATES, Gate, GateShape, build_model, check_model, register_gate
from gla_ablate.module import AblationModule
from gla_ablate.tracking import MetricsCSV, NonFinite, Stopwatch, TrainingLog, declare_hparams
from tests.registries import one_of_each_kind

MQAR = {"name": "mqar", "seq_len": 16, "batch_size": 4, "vocab_size": 32, "pairs": 3, "train_examples": 64}
MODEL = ModelConfig(dim=32, layers=2, heads=2, chunk_size=16)


class Counter(L.LightningModule):
    """Trains one weight on given losses: step n's loss is `losses[n]`."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.losses = losses
        self.grad_norm, self.step_lr = torch.ones(()), 0.5

    def training_step(self, batch, batch_idx):
        return self.weight * 0 + self.losses[batch_idx]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Late:
    """Batches, of each of which it says that it was waited for `seconds`."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds, self.waited = count, seconds, 0.0

    def __len__(self) -> int:  # without one Lightning takes a batch ahead
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            self.waited += self.seconds
            yield {"inputs": torch.zeros(4, 8), "targets": torch.zeros(4, 8)}


def train(losses: list[float], folder, log_every: int, late: float = 0.0) -> tuple[TrainingLog, list]:
    """`late`: seconds that each batch is waited for."""
    progress: list = []
    loader = Late(len(losses) + 1, late)
    log = TrainingLog(log_every, lambda *values: progress.append(values), lambda: loader.waited)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=len(losses),
        logger=MetricsCSV(folder / "metrics.csv"),
        callbacks=[log],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Counter(losses), loader)
    return log, progress


def test_metrics_csv_keeps_full_precision_and_is_readable_at_once(tmp_path):
    csv = MetricsCSV(tmp_path / "metrics.csv")
    csv.log_metrics({"a/b": 0.1 + 0.2, "lr": 1e-5}, step=3)
    csv.log_metrics({"lr": 2e-5}, step=4)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,metric,value", "3,a/b,0.30000000000000004", "3,lr,1e-05", "4,lr,2e-05"]
    assert csv.last == {"a/b": 0.1 + 0.2, "lr": 2e-5}


def test_training_is_logged_at_every_interval_and_after_the_last_step(tmp_path):
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    log, progress = train(losses, tmp_path, log_every=3)
    logged = [line for line in (tmp_path / "metrics.csv").read_text().splitlines() if "train/loss" in line]
    assert logged == ["3,train/loss,3.0", "6,train/loss,6.0", "7,train/loss,7.0"]
    assert [step for step, _, _ in progress] == [1, 2, 3, 4, 5, 6, 7]
    assert [loss for _, loss, _ in progress] == [None, None, 3.0, 3.0, 3.0, 6.0, 7.0]
    assert log.tokens == 7 * 32
    assert len(log.rates) == 3


def test_the_time_that_steps_wait_for_data_is_logged(tmp_path):
    train([1.0] * 9, tmp_path, log_every=3, late=0.03)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines() if "data_wait_ms" in line]
    assert [row[0] for row in rows] == ["3", "6", "9"]
    # The wait for the very first batch is the start's.
    assert [float(row[2]) for row in rows] == pytest.approx([20.0, 30.0, 30.0])


def test_waiting_before_an_interruption_counts_and_a_start_does_not():
    seconds = 0.0
    log = TrainingLog(10, lambda *values: None, lambda: seconds)
    seconds = 3.0  # the first batches of all
    log.on_train_batch_start(None, None, None, 0)
    seconds = 3.5
    log._losses = [torch.ones(())]
    state = log.state_dict()
    assert state["waited"] == 0.5
    again = TrainingLog(10, lambda *values: None, lambda: seconds)
    again.load_state_dict(state)
    assert again.state_dict()["waited"] == 0.5  # stopped before a step
    seconds = 7.0
    again.on_train_batch_start(None, None, None, 0)
    seconds = 7.25
    assert again.state_dict()["waited"] == 0.75


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_loss_that_is_not_finite_stops_with_its_step(tmp_path, value, at):
    losses = [1.0] * 7
    losses[at - 1] = value
    with pytest.raises(NonFinite, match=f"loss is {value} at step {at}"):
        train(losses, tmp_path, log_every=3)


def test_speed_leaves_the_first_interval_out_unless_it_is_alone():
    log = TrainingLog(10, lambda *values: None)
    log.rates = [5.0]
    assert log.tokens_per_s == 5.0
    log.rates = [5.0, 100.0, 110.0, 90.0]
    assert log.tokens_per_s == 100.0


def test_stopwatch_leaves_out_the_time_that_it_stood(monkeypatch):
    now = 100.0
    monkeypatch.setattr("gla_ablate.tracking.time.perf_counter", lambda: now)
    clock = Stopwatch()
    clock.start()
    now = 102.0
    clock.stop()
    now = 150.0
    assert clock.seconds() == 2.0
    clock.start()
    now = 151.0
    clock.start()  # it runs
    assert clock.lap() == 3.0
    now = 155.0
    assert clock.lap() == 4.0


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (2, 5, 3, 4)])
def test_values_are_sorted_by_head_whatever_the_gates_shape(shape):
    g = torch.zeros(shape)
    head = {1: (1,), 3: (..., 1), 4: (..., 1, slice(None))}[len(shape)]
    g[head] = -2.0
    values = by_head(g, 3, g.device)
    assert values.shape[0] == 3
    assert values.numel() == g.numel()
    assert (values[1] == -2).all()
    assert (values[[0, 2]] == 0).all()


def test_no_gate_counts_as_no_decay():
    assert by_head(None, 3, torch.device("cpu")).tolist() == [[0.0], [0.0], [0.0]]


def test_memory_length_is_capped():
    g = torch.tensor([0.0, -0.0, -0.001, -0.1, -10.0])
    torch.testing.assert_close(memory_length(g, cap=64), torch.tensor([64.0, 64.0, 64.0, 10.0, 0.1]))


@pytest.mark.parametrize("name", one_of_each_kind())
def test_statistics_are_those_of_the_gates_over_the_whole_validation(name, tmp_path):
    data = MQAR | {"val_tokens": 10 * 16}  # ten rows in batches of four
    module = AblationModule(Config(model=check_model(ModelConfig(**vars(MODEL) | {"gate": {"name": name}})), data=data))
    csv = MetricsCSV(tmp_path / "metrics.csv")
    board = TensorBoardLogger(tmp_path, name="", version="tensorboard", default_hp_metric=False)
    trainer = L.Trainer(
        accelerator="cpu", logger=[csv, board], callbacks=[GateStatistics(seq_len=16)], enable_progress_bar=False
    )
    datamodule = DataModule(data, seed=0)
    trainer.validate(module, datamodule, verbose=False)
    board.experiment.flush()

    seen: list = []
    gate = module.model.blocks[1].mixer.gate
    gate.register_forward_hook(lambda gate, args, g: seen.append(torch.zeros(2) if g is None else g))
    with torch.no_grad():
        module(datamodule.source.val[list(range(10))]["inputs"])
    g = seen[0]
    if isinstance(g, tuple):  # twice as many channels of v as of k: the numbers of the state (k, v) with v = 2k, 2k + 1
        g = g[0].repeat_interleave(2, -1) + g[1]
    g = g if g.ndim == 1 else g.movedim(2, 0).flatten(1)  # [H] or [H, n]
    for head in range(2):
        mean = g[head].mean().item()
        assert csv.last[f"gate/layer1/head{head}/forget"] == pytest.approx(g[head].exp().mean().item(), rel=1e-5)
        expected = 16 if mean == 0 else min(16, -1 / mean)
        assert csv.last[f"gate/layer1/head{head}/memory"] == pytest.approx(expected, rel=1e-5)

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    heads = [f"gate/layer{layer}/head{head}" for layer in range(2) for head in range(2)]
    names = {f"{head}/{what}" for head in heads for what in ("forget", "memory")}
    assert names <= set(events.Tags()["scalars"])
    assert {f"{name}_histogram" for name in names} == set(events.Tags()["histograms"])
    assert not gate._forward_pre_hooks
    assert len(gate._forward_hooks) == 1  # this test's own


@pytest.mark.parametrize(
    ("mixer", "layers"), [(["gla", "softmax"], {"0", "2"}), (["softmax", "gla"], {"1", "3"}), ("softmax", set())]
)
def test_statistics_are_of_the_layers_that_have_a_gate(mixer, layers, tmp_path):
    config = Config(model=check_model(ModelConfig(dim=32, layers=4, mixer=mixer)), data=MQAR | {"val_tokens": 64})
    csv = MetricsCSV(tmp_path / "metrics.csv")
    trainer = L.Trainer(
        accelerator="cpu", logger=csv, callbacks=[GateStatistics(seq_len=16)], enable_progress_bar=False
    )
    trainer.validate(AblationModule(config), DataModule(config.data, seed=0), verbose=False)
    named = {tag.split("/")[1].removeprefix("layer") for tag in csv.last if tag.startswith("gate/")}
    assert named == layers


def test_a_gate_that_lets_the_state_grow_is_found(tmp_path):
    module = AblationModule(Config(model=check_model(MODEL), data=MQAR | {"val_tokens": 64}))
    module.model.blocks[1].mixer.gate.register_forward_hook(lambda gate, args, g: -g)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=MetricsCSV(tmp_path / "metrics.csv"),
        callbacks=[GateStatistics(seq_len=16)],
        enable_progress_bar=False,
    )
    with pytest.raises(ValueError, match=r"the gate of layer 1 gave a log decay of 0\.\d+, takes at most 0"):
        trainer.validate(module, DataModule(MQAR | {"val_tokens": 64}, seed=0), verbose=False)


def test_a_wrong_sign_is_found_before_the_first_step(tmp_path, scratch_registry):
    @register_gate("grows")
    class Grows(Gate):
        decay_shape = "[B,T,H]"

        def __init__(self, shape: GateShape) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(shape.dim, shape.heads)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] <= 16  # as a gate with something of its own for each position would
            return -torch.nn.functional.logsigmoid(self.proj(x)).float()

    steps = []
    module = AblationModule(Config(model=check_model(replace(MODEL, gate={"name": "grows"})), data=MQAR))
    module.model.blocks[0].register_forward_hook(lambda *_: steps.append(1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        callbacks=[GateStatistics(seq_len=16)],
        enable_progress_bar=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ValueError, match=r"the gate of layer 0 gave a log decay of \d\.\d+, takes at most 0"):
        trainer.fit(module, DataModule(MQAR, seed=0))
    assert steps == []


def generators():
    """Where all of them stand."""
    return torch.random.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


@pytest.mark.parametrize("name", [*GATES.names(), "draws"])
def test_to_try_a_gate_leaves_everything_as_it_was(name, scratch_registry):
    @register_gate("draws")
    class Draws(Gate):
        decay_shape = "[B,T,H]"

        def __init__(self, shape: GateShape) -> None:
            super().__init__()
            self.heads = shape.heads
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return -torch.rand(*x.shape[:2], self.heads) * random.random() * numpy.random.rand()

    mixer = build_model(check_model(replace(MODEL, gate={"name": name})), vocab_size=17, seed=0).blocks[0].mixer
    before, drawn = {key: x.clone() for key, x in mixer.state_dict().items()}, generators()
    most = tried(mixer, 8)
    assert most is not None and most <= 0
    assert generators() == drawn and mixer.gate.training
    assert all(torch.equal(x, before[key]) for key, x in mixer.state_dict().items())


def test_hyperparameters_have_the_same_keys_and_types_whatever_the_gate_and_the_data():
    trials = [
        Config(model=check_model(ModelConfig(gate={"name": name}, mixer=mixer)), data=data)
        for name in GATES.names()
        for mixer in ("gla", ["gla", "softmax"])
        for data in (MQAR, {"name": "stdlib", "seq_len": 8, "batch_size": 2})
    ]
    kinds = [{key: type(value) for key, value in flat_hparams(trial).items()} for trial in trials]
    assert all(kind == kinds[0] for kind in kinds)
    assert set(kinds[0].values()) <= {bool, int, float, str}
    assert flat_hparams(trials[0])["model.gate_options"] == "rank=16, tau=16.0"
    assert [flat_hparams(trials[i])["model.mixer"] for i in (0, 2)] == ["gla", "gla,softmax"]


def test_a_trial_declares_what_it_is_without_logging_a_value(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="tensorboard", default_hp_metric=False)
    declare_hparams(board, Config(model=check_model(MODEL), data=MQAR))
    board.experiment.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == []
    content = events.PluginTagToContent("hparams")
    assert set(content) == {metadata.SESSION_START_INFO_TAG}  # what to show is the report's to say, once
    declared = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG]).hparams
    assert declared["model.gate"].string_value == "data_dependent"
    assert declared["model.heads"].number_value == 2
    assert declared["model.tie_embeddings"].WhichOneof("kind") == "bool_value"
