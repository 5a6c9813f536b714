"""`trainer.precision: bf16-true`: weights in bf16 that lose nothing of what the optimiser does."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gla_ablate
from gla_ablate.config import Config, ModelConfig, OptimConfig, TrainerConfig
from gla_ablate.export import export
from gla_ablate.loading import open_folder
from gla_ablate.masters import Masters
from gla_ablate.memory import step_bytes, training_bytes
from gla_ablate.model import build_model, check_model, count_parameters
from gla_ablate.module import AblationModule
from gla_ablate.resume import last
from tests.test_resume import outcome, plugin, trial  # noqa: F401 (a fixture)
from tests.test_trial import MODEL, MQAR, TRAINER, folder_for, metrics, read, run

BF16 = {"precision": "bf16-true"}
CONFIG = Config(model=check_model(ModelConfig(**MODEL)), data=MQAR, trainer=TrainerConfig(**BF16))
HYBRID = MODEL | {"mixer": ["gla", "softmax"], "short_conv": 4, "rope": True, "tie_embeddings": True}


def test_all_weights_are_in_bf16_but_those_of_gates():
    module = AblationModule(CONFIG)
    kinds = {name: p.dtype for name, p in module.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".gate." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".gate." not in name} == {torch.bfloat16}
    masters = module.masters.named(module)
    exact = build_model(CONFIG.model, 32, 0).state_dict(prefix="model.")
    assert masters.keys() == {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert all(torch.equal(masters[name], exact[name]) for name in masters)


@pytest.mark.parametrize("how", ["masters", "plain"])
def test_small_steps_add_up_where_bf16_alone_would_lose_them(how):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    before = layer.weight.detach().clone()
    if how == "plain":
        layer.bfloat16()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, weight_decay=0.0)
    else:
        masters = Masters(layer)
        optimizer = torch.optim.AdamW([masters.of(p) for p in layer.parameters()], lr=1e-5, weight_decay=0.0)
        optimizer.register_step_post_hook(lambda *_: masters.write_back())
    for _ in range(300):
        layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()  # a gradient of 1 for each weight
        if how == "masters":
            masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
    moved = (before - layer.weight.float()).mean().item()  # 300 steps of 1e-5
    assert moved == pytest.approx(3e-3, rel=0.02) if how == "masters" else moved < 1e-3


def test_gradients_add_up_in_fp32():
    layer = torch.nn.Linear(8, 8, bias=False)
    masters = Masters(layer)
    for size in (256.0, 1.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        layer(torch.full((1, 8), size, dtype=torch.bfloat16)).sum().backward()
        masters.take_gradients()
        assert layer.weight.grad is None
    (master,) = masters.masters
    assert master.grad.dtype == torch.float32 and (master.grad == 259).all()


def test_the_norm_and_the_clipping_are_those_of_the_fp32_gradients():
    module = AblationModule(CONFIG)
    optimizer = module.configure_optimizers()["optimizer"]
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in updated} == {torch.float32} and len(updated) == len([*module.parameters()])
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    norm = torch.stack([p.grad.double().norm() for p in module.parameters()]).norm()
    module.on_after_backward()
    module.configure_gradient_clipping(optimizer, 0.5, "norm")
    assert module.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert torch.stack([p.grad.double().norm() for p in updated]).norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    "model", [MODEL, MODEL | {"gate": {"name": "fixed_decay"}}, HYBRID], ids=["data_dependent", "fixed_decay", "hybrid"]
)
def test_it_trains_as_bf16_mixed_does(tmp_path, model):
    curves = []
    for precision in ("bf16-mixed", "bf16-true"):
        trainer = TRAINER | {"max_steps": 12, "val_every": 6, "precision": precision}
        folder = folder_for(tmp_path / precision, model=model, trainer=trainer)
        assert run(folder) == 0
        assert read(folder, "stamp.json")["precision"] == precision
        curves.append(metrics(folder))
    for tag in ("train/loss", "val/loss", *(tag for tag in curves[0] if tag.startswith("gate/"))):
        assert [*curves[1][tag].values()] == pytest.approx([*curves[0][tag].values()], rel=0.02), tag


def test_a_checkpoint_holds_the_masters_and_loads_and_exports_as_any_other(tmp_path):
    folder = folder_for(tmp_path, model=HYBRID, trainer=TRAINER | BF16)
    assert run(folder) == 0
    weights = torch.load(last(folder), weights_only=True)["state_dict"]
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert not torch.equal(weights["model.head.weight"], weights["model.head.weight"].bfloat16().float())
    assert torch.equal(weights["model.head.weight"], weights["model.embedding.weight"])
    model = gla_ablate.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exported = gla_ablate.load(export(folder))
    tokens = torch.arange(12)[None]
    assert torch.equal(exported(tokens), model(tokens))
    assert open_folder(folder).step == 7


@pytest.mark.parametrize(("accumulate", "call"), [(1, 10), (2, 5)])
def test_interrupted_it_goes_on_to_the_same_bits(
    plugin: Path,  # noqa: F811
    tmp_path: Path,
    accumulate: int,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = trial(tmp_path / "undisturbed", plugin, accumulate=accumulate, **BF16)
    assert run(want) == 0
    folder = trial(tmp_path / "trial", plugin, accumulate=accumulate, **BF16)
    monkeypatch.setenv("GLA_TEST_SIGNAL", f"{int(signal.SIGTERM)}@{call}")
    assert run(folder) == 130
    monkeypatch.delenv("GLA_TEST_SIGNAL")
    assert run(folder) == 0
    assert outcome(folder) == outcome(want)


def test_micro_batches_train_as_the_batch_does(tmp_path):
    curves = []
    for parts in (1, 4):
        folder = folder_for(tmp_path / f"{parts}", trainer=TRAINER | BF16 | {"accumulate": parts})
        assert run(folder) == 0
        curves.append(metrics(folder))
    for tag in ("train/loss", "val/loss"):
        assert [*curves[1][tag].values()] == pytest.approx([*curves[0][tag].values()], rel=1e-2), tag


def test_weight_decay_is_for_matrices_alone():
    config = replace(CONFIG, optim=OptimConfig(weight_decay=0.3))
    decayed, free = AblationModule(config).configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_its_memory_is_estimated(accumulate):
    data = {"name": "stdlib", "seq_len": 48, "batch_size": 4}
    config = replace(CONFIG, data=data, trainer=TrainerConfig(**BF16, accumulate=accumulate))
    traced = step_bytes(config, 2, 256, "cpu", True)
    assert traced == step_bytes(config, 2, 256, "cpu", True, fake=False)
    parameters = count_parameters(config.model, 256)
    assert training_bytes(config, 256, "cpu", True) == pytest.approx(traced + 14 * parameters, rel=1e-3)
    if accumulate == 1:  # else fp32 gradients stay beside those of the next micro-batch
        mixed = replace(config, trainer=TrainerConfig(precision="bf16-mixed"))
        assert training_bytes(config, 256, "cpu", True) < training_bytes(mixed, 256, "cpu", True)
