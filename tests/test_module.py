from __future__ import annotations

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from gla_ablate.config import Config, ModelConfig, OptimConfig, TrainerConfig
from gla_ablate.data import build_source, check_data
from gla_ablate.data.module import DataModule
from gla_ablate.data.reading import micro_batches
from gla_ablate.data.source import IGNORED
from gla_ablate.module import AblationModule, lr_factor
from gla_ablate.tracking import MetricsCSV, NonFinite

MODEL = ModelConfig(dim=32, layers=1, heads=2, chunk_size=16)
MQAR = {"name": "mqar", "seq_len": 16, "batch_size": 4, "vocab_size": 32, "pairs": 3, "train_examples": 64}
MQAR |= {"val_tokens": 160}  # ten rows: two whole batches and a half one


@pytest.fixture
def text(tmp_path, monkeypatch) -> dict:
    """A data part over a small text."""
    monkeypatch.setenv("GLA_ABLATE_CACHE", str(tmp_path / "cache"))
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: the quick brown fox jumps over the lazy dog. " * 40)
    files = {"files": [str(tmp_path / "train.txt")], "val_files": [str(tmp_path / "val.txt")]}
    return {"name": "text", "seq_len": 32, "batch_size": 4, "val_tokens": 10 * 32} | files


def module_for(data: dict, **optim) -> AblationModule:
    return AblationModule(Config(model=MODEL, data=data, optim=OptimConfig(**optim)))


def batch(masked: bool) -> dict[str, torch.Tensor]:
    """As the reader gives it."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(32, (2, 4, 16), generator=generator)
    if masked:
        targets[torch.rand(4, 16, generator=generator) < 0.7] = IGNORED
    return next(micro_batches({"inputs": inputs, "targets": targets}))


@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_mean_over_the_targets_that_count(masked):
    module, given = module_for(MQAR), batch(masked)
    loss = module.training_step(given, 0)
    expected = F.cross_entropy(module(given["inputs"]).flatten(0, 1), given["targets"].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_head_sees_the_positions_that_count_and_no_others(masked, monkeypatch):
    module, given = module_for(MQAR), batch(masked)
    seen, real = [], F.linear

    def linear(x, weight, bias=None):
        if weight is module.model.head.weight:
            seen.append(len(x))
        return real(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    module.training_step(given, 0)
    assert seen == [(given["targets"] != IGNORED).sum()]


def test_a_compiled_network_trains_as_it_does_uncompiled_and_validates_as_it_is(monkeypatch):
    seen = []

    def compile_(function, options=None):
        def run(*inputs):
            seen.append(function)
            return torch._dynamo.optimize("aot_eager")(function)(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    plain, module = (
        AblationModule(Config(model=MODEL, data=MQAR, trainer=TrainerConfig(compile=on))) for on in (False, True)
    )
    assert (plain.recompute, module.recompute) == ("none", "elementwise")
    losses = [each.training_step(batch(False), 0) for each in (plain, module)]
    assert len(seen) == MODEL.layers
    torch.testing.assert_close(*losses)
    ways = zip(losses, (plain, module), strict=True)
    torch.testing.assert_close(*(torch.autograd.grad(loss, [*each.parameters()]) for loss, each in ways))
    assert [*plain.state_dict()] == [*module.state_dict()]
    module.eval()
    module.hidden_and_targets(batch(False))
    assert len(seen) == MODEL.layers


def validated(module: AblationModule, data: dict, folder) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """(logged metrics, logits, targets) of the whole validation set at the positions that count."""
    csv = MetricsCSV(folder / "metrics.csv")
    trainer = L.Trainer(accelerator="cpu", logger=csv, enable_progress_bar=False, enable_checkpointing=False)
    datamodule = DataModule(data, seed=0)
    trainer.validate(module, datamodule, verbose=False)
    rows = datamodule.source.val[list(range(len(datamodule.source.val)))]
    counts = rows["targets"] != IGNORED
    with torch.no_grad():
        return csv.last, module(rows["inputs"])[counts], rows["targets"][counts]


def validation_rows(data: dict) -> dict[str, torch.Tensor]:
    """The whole validation set."""
    rows = build_source(check_data(data)).val
    return rows[list(range(len(rows)))]


def test_validation_of_text_weighs_every_token_alike(text, tmp_path):
    metrics, logits, targets = validated(module_for(text), text, tmp_path)
    loss = F.cross_entropy(logits, targets).item()
    assert metrics == {
        "val/loss": pytest.approx(loss, rel=1e-5),
        "val/ppl": pytest.approx(math.exp(loss), rel=1e-4),
        "val/bpb": pytest.approx(loss / math.log(2), rel=1e-5),
    }


def test_validation_of_recall_logs_accuracy_in_place_of_bits_per_byte(tmp_path):
    module = module_for(MQAR)
    module.model.head.weight.data[20] += 1  # an answer that comes often enough to be right sometimes
    metrics, logits, targets = validated(module, MQAR, tmp_path)
    assert set(metrics) == {"val/loss", "val/ppl", "val/accuracy"}
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    accuracy = (logits.argmax(-1) == targets).float().mean().item()
    assert metrics["val/accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("at_once", [1000, 7])
def test_each_setting_that_a_task_validates_has_an_accuracy_of_its_own(at_once, tmp_path, monkeypatch):
    monkeypatch.setattr("gla_ablate.module.rows_at_once", lambda weight: at_once)
    data = MQAR | {"pairs": [2, 3], "val_pairs": [3, 1, 2], "val_lengths": [16, 20, 12], "val_tokens": 20 * 20}
    module = module_for(data)
    module.model.head.weight.data[16:32:3] += 1  # answers that come often enough to be right sometimes
    metrics, logits, targets = validated(module, data, tmp_path)
    rows = validation_rows(data)
    setting = rows["setting"][:, None].expand_as(rows["targets"])[rows["targets"] != IGNORED]
    right = (logits.argmax(-1) == targets).double()
    assert 0 < right.mean() < 1
    assert metrics["val/accuracy"] == pytest.approx(right.mean().item())
    for i, name in enumerate(("3_pairs_in_16", "1_pairs_in_20", "2_pairs_in_12")):
        assert metrics[f"val/accuracy/{name}"] == pytest.approx(right[setting == i].mean().item())
    assert len(metrics) == 6


def test_validation_loss_that_is_not_finite_is_an_error(tmp_path):
    module = module_for(MQAR)
    module.model.head.weight.data[3, 3] = math.nan
    with pytest.raises(NonFinite, match="val/loss is nan at step 0"):
        validated(module, MQAR, tmp_path)


def test_weight_decay_is_for_matrices_alone():
    optimizer = module_for(MQAR, weight_decay=0.3).configure_optimizers()["optimizer"]
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(module_for(MQAR).parameters()))


@pytest.mark.parametrize(("clip", "after"), [(0.5, 0.5), (0.0, 10.0), (100.0, 10.0)])
def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_kept(clip, after):
    module = module_for(MQAR)
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 10 / math.sqrt(sum(p.numel() for p in parameters)))
    module.configure_gradient_clipping(torch.optim.SGD(parameters, lr=0.125), clip, "norm")
    assert module.grad_norm.item() == pytest.approx(10, rel=1e-4)
    assert module.step_lr == 0.125
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    assert norm.item() == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 100), (0, 100), (0, 1), (1, 2), (50, 20)])
def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor(warmup, steps):
    optim = OptimConfig(warmup_steps=warmup, min_lr_ratio=0.1)
    factors = [lr_factor(step, optim, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    top = min(warmup, steps)
    assert factors[:top] == pytest.approx([(step + 1) / warmup for step in range(top)])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    if steps > warmup + 1:
        assert factors[warmup] == 1
        assert factors[-1] == pytest.approx(0.1)
