from __future__ import annotations

from dataclasses import replace

import pytest

from gla_ablate.config import ModelConfig
from gla_ablate.errors import ConfigError
from gla_ablate.model import GATES, Gate, check_model, register_gate


def test_options_of_the_gate_are_completed():
    gate = check_model(ModelConfig(gate={"name": "data_dependent", "rank": 4})).gate
    assert gate == {"name": "data_dependent", "rank": 4, "tau": 16.0}


def test_checked_config_passes_unchanged():
    config = check_model(ModelConfig())
    assert check_model(config) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "model.heads: got 3, takes a divisor of 64 (dim · expand_k = 128 · 0.5)"),
        ({"heads": 48, "dim": 96, "expand_v": 0.75}, "model.heads: got 48, takes a divisor of 72"),
        ({"heads": 0}, "model.heads: got 0, takes a whole number from 1"),
        ({"dim": -8}, "model.dim: got -8, takes a whole number from 1"),
        ({"layers": 0}, "model.layers: got 0"),
        ({"ffn_ratio": 0.0}, "model.ffn_ratio: got 0.0, takes a number above 0"),
        ({"expand_k": float("nan")}, "model.expand_k: got nan"),
        (
            {"expand_k": 0.3},
            "model.expand_k: got 0.3, takes a number that gives a whole width: dim 128 · expand_k = 38.4",
        ),
        ({"dim": 2048, "heads": 2}, "model.heads: got 2, which makes 1024 channels a head"),
        ({"chunk_size": 48}, "model.chunk_size: got 48, takes auto, 16, 32, 64, 128 or 256"),
        ({"chunk_size": 512}, "model.chunk_size: got 512"),
        ({"backend": "tritn"}, "model.backend: got 'tritn', did you mean 'triton'? (valid: auto, triton, torch)"),
        ({"gate": {}}, "model.gate.name: got None, takes one of data_dependent, fixed_decay, none"),
        ({"gate": {"name": "fixed"}}, "model.gate.name: unknown gate 'fixed', did you mean 'fixed_decay'?"),
        ({"gate": {"name": "none", "tau": 1.0}}, "model.gate.tau: gate 'none' has no such option"),
        ({"gate": {"name": "data_dependent", "rnk": 1}}, "model.gate.rnk: gate 'data_dependent' has no such option"),
        ({"gate": {"name": "data_dependent", "rank": "x"}}, "model.gate.rank: got 'x', takes int"),
        ({"gate": {"name": "data_dependent", "rank": 0}}, "model.gate.rank: got 0, takes a whole number from 1"),
        ({"gate": {"name": "data_dependent", "tau": -1}}, "model.gate.tau: got -1.0, takes a number above 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_model_is_refused_by_its_dotted_key(change, message):
    with pytest.raises(ConfigError) as error:
        check_model(replace(ModelConfig(), **change))
    assert message in str(error.value)


def test_widths_that_floats_blur_are_whole():
    check_model(ModelConfig(dim=30, heads=3, expand_k=0.1))  # 30 · 0.1 = 3.0000000000000004 in some orders of rounding


@pytest.fixture
def broken(monkeypatch):
    """Registers a gate under the name "broken": the class that it is given."""
    monkeypatch.setattr(GATES, "_classes", dict(GATES._classes))
    return register_gate("broken")


def refusal() -> str:
    with pytest.raises(ConfigError) as error:
        check_model(ModelConfig(gate={"name": "broken"}))
    return str(error.value)


def test_a_gate_that_fails_in_a_later_layer_is_refused(broken):
    @broken
    class Later(Gate):
        decay_shape = "none"

        def __init__(self, shape):
            super().__init__()
            if shape.layer == 1:
                raise RuntimeError("boom")

    assert refusal() == "model.gate: gate 'broken' can't be built: RuntimeError: boom"


def test_a_gate_whose_shared_parameters_fail_is_refused(broken):
    @broken
    class Shares(Gate):
        decay_shape = "none"

        def __init__(self, shape):
            super().__init__()

        @classmethod
        def build_shared(cls, shape):
            raise RuntimeError("boom")

    assert refusal() == "model.gate: gate 'broken' can't be built: RuntimeError: boom"


@pytest.mark.parametrize(
    ("kind", "default", "message"),
    [
        ("Unknown", 1, "gate 'broken': its options have types that can't be read: name 'Unknown' is not defined"),
        (int, None, "model.gate.x: the default of gate 'broken': got None, takes int"),
        (object, int, "model.gate.x: the default of gate 'broken': got <class 'int'>, takes what YAML can write"),
        (object, (1, 2), "model.gate.x: the default of gate 'broken': got (1, 2), takes what YAML can write"),
    ],
    ids=["unknown type", "default of another type", "object", "tuple"],
)
def test_an_option_that_no_trial_could_read_back_is_refused(broken, kind, default, message):
    def init(self, shape, *, x=default):
        Gate.__init__(self)

    init.__annotations__ = {"x": kind}
    broken(type("Odd", (Gate,), {"decay_shape": "none", "__init__": init}))
    assert refusal().startswith(message)
