from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gla_ablate.config import ModelConfig
from gla_ablate.model import GATES, Gate, build_model, check_model, gates, register_gate

TINY = ModelConfig(dim=32, layers=3, heads=2, chunk_size=16)
EVERY_GATE = pytest.mark.parametrize("name", GATES.names())


def with_gate(name: str, **options) -> ModelConfig:
    return check_model(replace(TINY, gate={"name": name, **options}))


@EVERY_GATE
@pytest.mark.parametrize("length", [0, 1, 37])
def test_logits_have_a_row_per_token_and_a_column_per_word(name, length):
    model = build_model(with_gate(name), vocab_size=19)
    assert model(torch.zeros(2, length, dtype=torch.long)).shape == (2, length, 19)


@EVERY_GATE
def test_models_that_differ_in_the_gate_alone_share_all_other_weights(name):
    ours, theirs = (build_model(with_gate(n), vocab_size=19, seed=5).state_dict() for n in (name, "none"))
    shared = [key for key in ours if ".gate." not in key]
    own = {f"blocks.{layer}.mixer.k_proj.weight" for layer in range(3)} if GATES[name].own_keys else set()
    assert shared == [key for key in theirs if key not in own]
    assert all(torch.equal(ours[key], theirs[key]) for key in shared)


def test_options_of_the_gate_leave_all_other_weights_alone():
    low, high = (build_model(with_gate("data_dependent", rank=r), vocab_size=19).state_dict() for r in (2, 16))
    assert all(torch.equal(low[key], high[key]) for key in low if ".gate." not in key)


@EVERY_GATE
def test_building_leaves_torchs_generator_untouched(name):
    before = torch.get_rng_state()
    build_model(with_gate(name), vocab_size=19, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@EVERY_GATE
def test_weights_depend_on_the_seed_and_on_nothing_drawn_before(name):
    first = build_model(with_gate(name), vocab_size=19, seed=1).state_dict()
    torch.rand(100)
    again = build_model(with_gate(name), vocab_size=19, seed=1).state_dict()
    other = build_model(with_gate(name), vocab_size=19, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in first if first[key].ndim == 2)


def test_gates_of_different_layers_start_differently():
    first, second, third = (
        block.mixer.gate.down.weight for block in build_model(with_gate("data_dependent"), 19).blocks
    )
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_initial_loss_is_near_that_of_guessing():
    model = build_model(check_model(ModelConfig()), vocab_size=256)
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert math.log(256) - 0.1 < loss < math.log(256) + 1


def test_tied_embeddings_are_one_parameter():
    model = build_model(check_model(replace(TINY, tie_embeddings=True)), vocab_size=19)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_parameters_that_the_gates_share_are_built_once_and_trained(scratch_registry):
    @register_gate("bounded")
    class Bounded(Gate):
        decay_shape = "[B,T,H,K]"

        @classmethod
        def build_shared(cls, shape: gates.GateShape) -> torch.nn.Module:
            return torch.nn.ParameterList([torch.randn(shape.layers, shape.heads, shape.key_dim)])

        def __init__(self, shape: gates.GateShape) -> None:
            super().__init__()
            self.shape = shape

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bound = torch.nn.functional.logsigmoid(self.shared[0][self.shape.layer])  # [H, K]
            return bound.expand(*x.shape[:2], *bound.shape)

    model = build_model(with_gate("bounded"), vocab_size=19)
    shared = {id(block.mixer.gate.shared[0]) for block in model.blocks}
    assert len(shared) == 1
    assert sum(parameter.shape == (3, 2, 8) for parameter in model.parameters()) == 1
    model(torch.zeros(2, 20, dtype=torch.long)).sum().backward()
    assert model.blocks[0].mixer.gate.shared[0].grad.flatten(1).any(1).all()  # a row for each layer


def test_chunk_size_does_not_change_the_output():
    tokens = torch.randint(19, (2, 100), generator=torch.Generator().manual_seed(0))
    small, *others = (
        build_model(check_model(replace(TINY, chunk_size=size)), vocab_size=19)(tokens) for size in (16, 128, "auto")
    )
    for other in others:
        torch.testing.assert_close(small, other, rtol=1e-4, atol=1e-5)
