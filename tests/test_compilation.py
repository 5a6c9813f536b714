"""What "auto" stands for in trainer.compile and trainer.recompute."""

import pytest
import torch

from gla_ablate.compilation import resolve_compile, resolve_recompute
from gla_ablate.config import Config, ModelConfig, TrainerConfig

SMALL, LARGE = ModelConfig(), ModelConfig(dim=1024, layers=24, heads=4)
FEW, MANY = {"seq_len": 256, "batch_size": 8}, {"seq_len": 2048, "batch_size": 16}


def asked(model=LARGE, data=MANY, steps=1000, **trainer):
    return Config(model=model, data={"name": "stdlib", **data}, trainer=TrainerConfig(max_steps=steps, **trainer))


@pytest.mark.parametrize(
    "config, device, compiled",
    [
        (asked(), "cuda", True),
        (asked(), "cpu", False),
        (asked(steps=100), "cuda", False),  # over before it has paid
        (asked(SMALL, FEW, 10**6), "cuda", False),  # bound by the host
        (asked(SMALL, FEW, compile=True), "cpu", True),
        (asked(compile=False), "cuda", False),
    ],
)
def test_compiled_where_asked_and_else_where_it_pays(config, device, compiled):
    assert resolve_compile(config, 32_000, torch.device(device)) is compiled


def test_recompute_is_as_asked_and_else_what_costs_nothing():
    assert [resolve_recompute(asked(), compiled) for compiled in (True, False)] == ["elementwise", "none"]
    assert resolve_recompute(asked(recompute="block"), True) == "block"
    assert resolve_recompute(asked(recompute="none"), True) == "none"
