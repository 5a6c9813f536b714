from __future__ import annotations

from dataclasses import replace

import pytest

from gla_ablate.config import ModelConfig
from gla_ablate.errors import ConfigError
from gla_ablate.model import Gate, check_model, register_gate
from gla_ablate.model.kinds import mixers, softmax_heads


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
        ({"gate": {}}, "model.gate.name: got None, takes one of data_dependent, "),
        ({"gate": {"name": "fixed"}}, "model.gate.name: unknown gate 'fixed', did you mean 'fixed_decay'?"),
        ({"gate": {"name": "none", "tau": 1.0}}, "model.gate.tau: gate 'none' has no such option"),
        ({"gate": {"name": "data_dependent", "rnk": 1}}, "model.gate.rnk: gate 'data_dependent' has no such option"),
        ({"gate": {"name": "data_dependent", "rank": "x"}}, "model.gate.rank: got 'x', takes int"),
        ({"gate": {"name": "data_dependent", "rank": 0}}, "model.gate.rank: got 0, takes a whole number from 1"),
        ({"gate": {"name": "data_dependent", "tau": -1}}, "model.gate.tau: got -1.0, takes a number above 0"),
        ({"mixer": "softmx"}, "model.mixer: got 'softmx', did you mean 'softmax'? (valid: gla, softmax)"),
        ({"mixer": ["gla", "mamba"]}, "model.mixer: got 'mamba' (valid: gla, softmax)"),
        ({"mixer": []}, "model.mixer: got 0 names, takes from one to as many as model.layers, 2"),
        ({"mixer": ["gla", "gla", "softmax"]}, "model.mixer: got 3 names, takes from one to as many as"),
        ({"mixer": "softmax", "window": 0}, "model.window: got 0, takes a whole number from 1, or null"),
        ({"window": -1}, "model.window: got -1"),
        ({"short_conv": -1}, "model.short_conv: got -1, takes a whole number from 0 (none) to 1024"),
        ({"short_conv": 5000}, "model.short_conv: got 5000"),
        ({"rope": True, "dim": 96, "heads": 16}, "model.rope: got true, which turns pairs of channels; a head of q"),
        ({"mixer": "softmax", "softmax_heads": 0}, "model.softmax_heads: got 0, takes auto, or a divisor of"),
        ({"mixer": "softmax", "softmax_heads": 3}, "model.softmax_heads: got 3, takes auto, or a divisor of"),
        ({"mixer": "softmax", "softmax_heads": 128}, "model.softmax_heads: got 128, which makes softmax heads of 1"),
        (
            {"mixer": "softmax", "dim": 33},
            "model.dim: got 33, which makes softmax heads of 33 channels",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_model_is_refused_by_its_dotted_key(change, message):
    with pytest.raises(ConfigError) as error:
        check_model(replace(ModelConfig(), **change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        (["gla"], "gla"),
        (["softmax", "softmax"], "softmax"),
        (["gla", "softmax", "gla", "softmax"], ["gla", "softmax"]),
        (["gla", "gla", "softmax"], ["gla", "gla", "softmax"]),  # and gla again
        (["gla", "softmax", "softmax", "gla"], ["gla", "softmax", "softmax"]),
    ],
    ids=str,
)
def test_mixers_are_spelled_one_way_and_mean_the_same_layers(given, spelled):
    config = ModelConfig(layers=4, mixer=given)
    checked = check_model(config)
    assert checked.mixer == spelled
    assert mixers(checked) == mixers(config)


def test_a_model_has_no_options_of_layers_that_it_does_not_have():
    options = {"short_conv": 4, "rope": True, "window": 8, "softmax_heads": 1}
    gla, softmax, both = (check_model(ModelConfig(mixer=m, **options)) for m in ("gla", "softmax", ["gla", "softmax"]))
    assert gla == check_model(ModelConfig(short_conv=4, rope=True))
    others = [
        {"gate": {"name": "fixed_decay"}},
        {"heads": 1000},
        {"expand_k": 0.3},
        {"expand_v": 9.0},
        {"chunk_size": 64},
    ]
    for other in others:
        assert softmax == check_model(ModelConfig(mixer="softmax", window=8, softmax_heads=1, **other))
    assert {key: getattr(both, key) for key in options} == options
    assert all(check_model(config) == config for config in (gla, softmax, both))


@pytest.mark.parametrize(
    ("dim", "heads"), [(32, 1), (64, 1), (96, 1), (128, 2), (200, 2), (1000, 10), (1024, 16), (2048, 32)]
)
def test_softmax_heads_are_64_channels_wide_or_a_little_more(dim, heads):
    assert softmax_heads(check_model(ModelConfig(dim=dim, mixer="softmax"))) == heads


def test_widths_that_floats_blur_are_whole():
    check_model(ModelConfig(dim=30, heads=3, expand_k=0.1))  # 30 · 0.1 = 3.0000000000000004 in some orders of rounding


@pytest.fixture
def broken(scratch_registry):
    """Registers a gate under the name "broken": the class that it is given."""
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
