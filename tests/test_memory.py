"""The estimate of memory, against steps that really run."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gla_ablate.config import Config, ModelConfig, TrainerConfig
from gla_ablate.memory import Peak, Untraced, step_bytes, training_bytes
from gla_ablate.model import count_parameters
from gla_ablate.model.gates import Gate, GateShape, register_gate
from gla_ablate.model.shapes import check_model
from tests.registries import one_of_each_kind

DATA = {"name": "stdlib", "seq_len": 48, "batch_size": 2}


def small(**model):
    return Config(model=check_model(ModelConfig(dim=32, heads=2, **model)), data=DATA)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("gate", one_of_each_kind())
def test_a_step_without_data_takes_what_a_real_one_does(gate, bf16):
    config = small(gate={"name": gate})
    assert step_bytes(config, 2, 256, "cpu", bf16) == step_bytes(config, 2, 256, "cpu", bf16, fake=False) > 50_000


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_a_step_of_other_mixers_without_data_takes_what_a_real_one_does(window, bf16):
    config = small(mixer=["gla", "softmax"], short_conv=4, rope=True, window=window)
    assert step_bytes(config, 2, 256, "cpu", bf16) == step_bytes(config, 2, 256, "cpu", bf16, fake=False) > 50_000


@pytest.mark.parametrize("recompute", ["elementwise", "block"])
def test_what_is_formed_anew_is_not_kept(recompute):
    less, all_ = (replace(small(), trainer=TrainerConfig(recompute=kind)) for kind in (recompute, "none"))
    own = step_bytes(less, 3, 256, "cpu", False)
    assert own == step_bytes(less, 3, 256, "cpu", False, fake=False) < 0.9 * step_bytes(all_, 3, 256, "cpu", False)


@pytest.mark.parametrize("mixer", ["gla", "softmax", ["gla", "gla", "softmax"], ["softmax", "gla"]], ids=str)
def test_two_layers_tell_what_five_take(mixer):
    config = small(layers=5, mixer=mixer)
    whole = step_bytes(config, 5, 256, "cpu", False) + 12 * count_parameters(config.model, 256)
    assert training_bytes(config, 256, "cpu", False) == pytest.approx(whole, rel=1e-3)


def test_more_of_anything_takes_more():
    def bytes_of(config, bf16=False):
        return training_bytes(config, 256, "cpu", bf16)

    base = small()
    assert bytes_of(base) > 16 * count_parameters(base.model, 256)
    assert bytes_of(replace(base, data=DATA | {"batch_size": 4})) > 1.5 * bytes_of(base)
    assert bytes_of(small(layers=4)) > 1.5 * bytes_of(base)
    assert bytes_of(base, bf16=True) < bytes_of(base)


def test_of_several_devices_each_has_its_rows_and_under_fsdp_its_share_of_the_weights():
    alone, base = small(), replace(small(), data=DATA | {"batch_size": 4})
    assert training_bytes(replace(base, trainer=TrainerConfig(devices=2)), 256, "cpu", False) == training_bytes(
        alone, 256, "cpu", False
    )
    fsdp = training_bytes(replace(base, trainer=TrainerConfig(devices=2, strategy="fsdp")), 256, "cpu", False)
    assert training_bytes(alone, 256, "cpu", False) - fsdp == 8 * count_parameters(alone.model, 256)


def test_micro_batches_take_less_and_their_gradients_stay():
    data = DATA | {"batch_size": 16}
    config = replace(small(), data=data)
    parts = replace(config, trainer=TrainerConfig(accumulate=4))
    assert step_bytes(parts, 2, 256, "cpu", False) == step_bytes(parts, 2, 256, "cpu", False, fake=False)
    whole, own = (training_bytes(c, 256, "cpu", False) for c in (config, parts))
    alone = training_bytes(replace(config, data=data | {"batch_size": 4}), 256, "cpu", False)
    assert alone <= own < 0.5 * whole


def test_what_is_freed_counts_once():
    with Peak() as peak:
        a = torch.ones(1000)  # fp32
        b = a.view(10, 100)
        del a, b
        c = torch.ones(500)
    assert (peak.most, peak.now) == (4000, 2000)
    del c


def test_a_gate_that_needs_numbers_has_no_estimate(scratch_registry):
    @register_gate("peeks")
    class Peeks(Gate):
        decay_shape = "none"

        def __init__(self, shape: GateShape) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> None:
            x.sum().item()

    config = small(gate={"name": "peeks"})
    assert step_bytes(config, 1, 256, "cpu", False, fake=False) > 0
    with pytest.raises(Untraced, match="DataDependentOutputException"):
        training_bytes(config, 256, "cpu", False)
