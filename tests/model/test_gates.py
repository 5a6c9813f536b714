"""What every gate must be, for all that are registered.

A plugin's gates join them: `GLA_ABLATE_PLUGINS=my_gates.py pytest tests/model/test_gates.py` (several files with ":").
"""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gla_ablate.config import ModelConfig
from gla_ablate.errors import ConfigError
from gla_ablate.model import DECAY_SHAPES, GATES, Gate, build_model, check_model, load_plugins, register_gate
from gla_ablate.model.gates import VALUED, both

PLUGINS = os.environ.get("GLA_ABLATE_PLUGINS", "")
load_plugins(PLUGINS.split(os.pathsep) if PLUGINS else [])
EVERY_GATE = pytest.mark.parametrize("name", GATES.names())

DIM, HEADS, KEY_DIM, VALUE_DIM = 32, 2, 8, 16


def model_with(name: str, seed: int = 0):
    config = ModelConfig(dim=DIM, layers=2, heads=HEADS, chunk_size=16, gate={"name": name})
    return build_model(check_model(config), vocab_size=17, seed=seed)


def gate_of(name: str) -> Gate:
    return model_with(name).blocks[1].mixer.gate


def inputs(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(3, 20, DIM, generator=torch.Generator().manual_seed(1))


@EVERY_GATE
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e30])
def test_decay_is_finite_and_never_above_zero(name, scale, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decays = both(gate_of(name)(inputs(scale)))
    for g in filter(lambda g: g is not None, decays):
        assert g.dtype == torch.float32
        assert g.isfinite().all()
        assert (g <= 0).all()


@EVERY_GATE
def test_decay_has_the_shape_that_the_gate_states(name):
    decay = gate_of(name)(inputs())
    shapes = {"none": None, "[H]": (HEADS,), "[B,T,H]": (3, 20, HEADS), "[B,T,H,K]": (3, 20, HEADS, KEY_DIM)}
    on_values = (3, 20, HEADS, VALUE_DIM)
    assert {*shapes, VALUED} == set(DECAY_SHAPES)
    assert isinstance(decay, tuple) == (GATES[name].decay_shape == VALUED)
    g, gv = both(decay)
    assert (None if g is None else tuple(g.shape)) == shapes[GATES[name].decay_shape.removesuffix(", [B,T,H,V]")]
    assert gv is None or tuple(gv.shape) == on_values


@EVERY_GATE
def test_gate_leaves_the_shapes_of_keys_and_values(name):
    gate = gate_of(name)
    k, v = torch.randn(3, 20, HEADS, KEY_DIM), torch.randn(3, 20, HEADS, VALUE_DIM)
    new_k, new_v = gate.transform(both(gate(inputs()))[0], k, v)
    assert (new_k.shape, new_v.shape) == (k.shape, v.shape)


@EVERY_GATE
def test_output_at_a_position_ignores_later_tokens(name):
    model = model_with(name)
    tokens = torch.randint(17, (2, 40), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 17
    assert torch.equal(model(tokens)[:, :25], model(changed)[:, :25])


@EVERY_GATE
def test_finite_gradient_reaches_every_parameter_of_the_gate(name):
    model = model_with(name)
    tokens = torch.randint(17, (2, 40), generator=torch.Generator().manual_seed(2))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    for block in model.blocks:
        for key, parameter in block.mixer.gate.named_parameters():
            assert parameter.grad is not None, f"{key} has no part in the output"
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), f"{key} gets no gradient but zeros"


@EVERY_GATE
def test_model_with_the_gate_learns_a_sequence(name):
    model = model_with(name)
    tokens = torch.randint(17, (4, 33), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@EVERY_GATE
def test_saving_and_loading_gives_the_same_output(name):
    saved, other = model_with(name, seed=0), model_with(name, seed=1)
    tokens = torch.randint(17, (2, 20))
    assert not torch.equal(saved(tokens), other(tokens))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(saved(tokens), other(tokens))


@EVERY_GATE
def test_gate_says_what_it_computes(name):
    assert GATES[name].formula


def test_data_dependent_gate_forgets_more_slowly_at_a_higher_temperature():
    def memory(tau: float) -> float:
        config = ModelConfig(dim=DIM, layers=1, heads=HEADS, gate={"name": "data_dependent", "tau": tau})
        gate = build_model(check_model(config), vocab_size=17).blocks[0].mixer.gate
        return -1 / gate(inputs()).mean().item()

    assert memory(32.0) == pytest.approx(2 * memory(16.0))
    assert memory(16.0) == pytest.approx(16 / math.log(2), rel=0.1)


def test_fixed_decay_is_retnets():
    decay = gate_of("fixed_decay")(inputs()).double().exp()
    torch.testing.assert_close(decay, torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=torch.float64), rtol=1e-8, atol=0)


def test_gate_without_a_valid_decay_shape_is_refused():
    with pytest.raises(ConfigError, match=r"decay_shape is '\[T\]', takes one of none, \[H\]"):

        @register_gate("odd")
        class Odd(Gate):
            decay_shape = "[T]"

    assert "odd" not in GATES


def test_these_tests_pick_up_the_gate_of_a_plugin():
    """The ten-line example, through the tests of this file in a process of their own."""
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-k",
        "my_decay",
        str(here),
    ]
    environment = os.environ | {"GLA_ABLATE_PLUGINS": str(here.with_name("example_gate.py"))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=here.parents[2], timeout=300)
    assert run.returncode == 0, run.stdout
    for property_ in ("finite_and_never_above_zero", "learns_a_sequence", "saving_and_loading"):
        assert any(f"{property_}" in line and line.startswith("PASSED") for line in run.stdout.splitlines())
