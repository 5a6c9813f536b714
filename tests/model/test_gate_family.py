"""Each gate against the recurrence that it was published with, written out here token by token, in fp64 and from the
weights alone: nothing of the gate's own g is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gla_ablate.config import ModelConfig
from gla_ablate.errors import ConfigError
from gla_ablate.model import GATES, build_model, check_model
from gla_ablate.model import mixer as mixers
from gla_ablate.model.mixer import GLAMixer
from tests.registries import built_in_gates, one_of_each_kind

LAYERS, HEADS, K, V = 3, 2, 6, 12

Step = Callable[[GLAMixer, int, Tensor, SimpleNamespace], Tensor]
STEPS: dict[str, Step] = {}  # a gate: the state after a token, from the mixer, its layer, the state before, the token


def step(name: str) -> Callable[[Step], Step]:
    return lambda function: STEPS.setdefault(name, function)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def affine(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    return x @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())


@step("none")
def linear_attention(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    return S + outer(t.k, t.v)


@step("fixed_decay")
def retnet(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(HEADS)], dtype=torch.float64)
    return gamma[:, None, None] * S + outer(t.k, t.v)


@step("layerwise_decay")
def transnormer(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    number = layer + 1  # counted from 1
    decay = [math.exp(-8 * h / HEADS * (1 - number / LAYERS)) for h in range(HEADS)]
    return torch.tensor(decay, dtype=torch.float64)[:, None, None] * S + outer(t.k, t.v)


@step("learned_decay")
def eagle(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    w = torch.exp(-torch.exp(mixer.gate.w.double())).view(HEADS, K)
    return w[..., None] * S + outer(t.k, t.v)


@step("data_dependent")
def gla(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    alpha = sigmoid(affine(mixer.gate.up, affine(mixer.gate.down, t.x))) ** (1 / 16)
    return alpha.view(-1, HEADS, K)[..., None] * S + outer(t.k, t.v)


@step("data_dependent_full_rank")
def gla_full_rank(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    alpha = sigmoid(affine(mixer.gate.proj, t.x)) ** (1 / 16)
    return alpha.view(-1, HEADS, K)[..., None] * S + outer(t.k, t.v)


@step("data_dependent_kv")
def gla_general(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    thin = affine(mixer.gate.down, t.x)
    alpha = sigmoid(affine(mixer.gate.up, thin)).view(-1, HEADS, K) ** (1 / 16)
    beta = sigmoid(affine(mixer.gate.up_values, thin)).view(-1, HEADS, V) ** (1 / 16)
    return outer(alpha, beta) * S + outer(t.k, t.v)


@step("data_dependent_scalar")
def gated_retnet(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    gamma = sigmoid(affine(mixer.gate.proj, t.x)) ** (1 / 16)  # [B, H]
    return gamma[..., None, None] * S + outer(t.k, t.v)


@step("mamba2")
def mamba2(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    A = -torch.exp(mixer.gate.A_log.double())  # negative there
    dt = torch.log(1 + torch.exp(affine(mixer.gate.proj, t.x) + mixer.gate.dt_bias.double()))  # [B, H]
    return torch.exp(dt * A)[..., None, None] * S + dt[..., None, None] * outer(t.k, t.v)


@step("hgrn2")
def hgrn2(mixer: GLAMixer, layer: int, S: Tensor, t: SimpleNamespace) -> Tensor:
    exponential = torch.exp(mixer.gate.shared.weight.double()).view(LAYERS, HEADS, K)
    share = exponential / exponential.sum(0)
    bound = share.cumsum(0)[layer] - share[0]
    forget = bound + (1 - bound) * sigmoid(affine(mixer.gate.proj, t.x)).view(-1, HEADS, K)
    return forget[..., None] * S + outer(1 - forget, t.v)


def model_of(name: str, dtype: torch.dtype, **options):
    """Three layers, gates away from where they start, so that no parameter is 0 or the same for all heads."""
    config = ModelConfig(
        dim=24, layers=LAYERS, heads=HEADS, expand_k=0.5, chunk_size=16, gate={"name": name}, **options
    )
    model = build_model(check_model(config), vocab_size=7).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".gate." in key and p.ndim == 1:
                p += 0.5 * torch.randn_like(p)
    return model


def layer_and_recurrence(name: str, layer: int, dtype: torch.dtype, monkeypatch, T: int, **options):
    """o [B,T,H,V] of the op inside the layer, and of the published recurrence."""
    mixer = model_of(name, dtype, **options).blocks[layer].mixer
    x = 1.5 * torch.randn(2, T, 24, generator=torch.Generator().manual_seed(2), dtype=dtype)
    seen = []

    def attend(*arguments, **keywords):
        o, state = attention(*arguments, **keywords)
        seen.append(o)
        return o, state

    attention = mixers.gated_linear_attention
    monkeypatch.setattr(mixers, "gated_linear_attention", attend)
    with torch.no_grad():
        mixer(x)
        x = x.double()
        S, expected = torch.zeros(2, HEADS, K, V, dtype=torch.float64), []
        for t in range(T):
            k = None if mixer.gate.own_keys else affine(mixer.k_proj, x[:, t]).view(2, HEADS, K)
            v = affine(mixer.v_proj, x[:, t]).view(2, HEADS, V)
            S = STEPS[name](mixer, layer, S, SimpleNamespace(x=x[:, t], k=k, v=v))
            q = affine(mixer.q_proj, x[:, t]).view(2, HEADS, K)
            expected.append((q[..., None, :] @ S)[..., 0, :] * K**-0.5)
    return seen[0].double(), torch.stack(expected, 1)


@pytest.mark.parametrize("name", built_in_gates())
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_is_the_recurrence_that_its_gate_was_published_with(name, layer, monkeypatch):
    o, expected = layer_and_recurrence(name, layer, torch.float64, monkeypatch, T=40)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)  # a gate computes in fp32


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels then run on the GPU alone")
@pytest.mark.parametrize("name", built_in_gates())
def test_so_it_is_through_the_kernels(name, monkeypatch):
    pytest.importorskip("triton")
    o, expected = layer_and_recurrence(name, 1, torch.float32, monkeypatch, T=20, backend="triton")
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)


def gate_of(name: str, layer: int = 1, **options):
    config = ModelConfig(dim=24, layers=LAYERS, heads=HEADS, gate={"name": name, **options})
    return build_model(check_model(config), vocab_size=7).blocks[layer].mixer.gate


def test_the_bound_of_hgrn2_is_0_in_the_first_layer_and_rises_with_each():
    model = model_of("hgrn2", torch.float32)
    first, second, third = (block.mixer.gate.lower_bound() for block in model.blocks)
    assert not first.any()
    assert (first < second).all() and (second < third).all() and (third < 1).all()
    assert [gate_of("hgrn2", layer).lower_bound().unique().tolist() for layer in range(3)] == [
        [0.0], [pytest.approx(1 / 3)], [pytest.approx(2 / 3)]
    ]  # fmt: skip


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("size", [0.1, 20.0, 1e3, 1e6])
def test_keys_of_hgrn2_are_what_is_forgotten_to_the_last_digit_and_gradients_are_finite(layer, size):
    gate = gate_of("hgrn2", layer)
    x = size * torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(0))
    g = gate(x)
    k = gate.keys(g)
    z = x.double() @ gate.proj.weight.double().T
    expected = (1 - layer / LAYERS) * sigmoid(-z.clamp(max=80)).unflatten(-1, (HEADS, -1))
    near = z.abs().unflatten(-1, (HEADS, -1)) < 80
    torch.testing.assert_close(k.double()[near], expected[near], rtol=2e-4, atol=1e-30)
    assert ((k >= 0) & (k <= 1)).all() and g.isfinite().all()
    (k.sum() + g.clamp(min=-1e4).sum()).backward()
    assert gate.proj.weight.grad.isfinite().all() and gate.shared.weight.grad.isfinite().all()


def test_a_bound_of_nearly_1_lets_no_state_grow():
    model = model_of("hgrn2", torch.float32)
    gate = model.blocks[2].mixer.gate
    with torch.no_grad():
        gate.shared.weight.view(LAYERS, -1)[0] = -40.0
        g = gate(torch.randn(4, 200, 24))
    assert (g <= 0).all() and g.isfinite().all()


def test_a_gate_that_makes_keys_has_no_projection_for_them():
    mixer = model_of("hgrn2", torch.float32, short_conv=3).blocks[0].mixer
    assert not [key for key, _ in mixer.named_parameters() if key.startswith("k_")]
    assert set(mixer.new_cache(1, 5).inputs) == {"q", "v"}


def test_mamba2_starts_with_the_published_steps_and_rates():
    gate = build_model(check_model(ModelConfig(dim=512, heads=256, gate={"name": "mamba2"})), 7).blocks[0].mixer.gate
    dt = torch.nn.functional.softplus(gate.dt_bias.detach()).log10()
    assert -3.001 < dt.min() < -2.9 and -1.1 < dt.max() < -0.999
    assert dt.mean().item() == pytest.approx(-2, abs=0.1)
    assert 1 <= gate.rate().min() < 1.5 and 15.5 < gate.rate().max() <= 16
    assert gate.rate().mean().item() == pytest.approx(8.5, abs=0.8)


def test_mamba2_finds_its_step_again_in_what_it_gave():
    gate = gate_of("mamba2")
    x, v = torch.randn(2, 9, 24), torch.ones(2, 9, HEADS, V)
    with torch.autocast("cpu", torch.bfloat16):
        g = gate(x)
        _, scaled = gate.transform(g, v, v.bfloat16())
        dt = torch.nn.functional.softplus(gate.proj(x).float() + gate.dt_bias)
    assert scaled.dtype == torch.bfloat16
    torch.testing.assert_close(scaled.float(), dt[..., None].expand_as(v), rtol=2**-8, atol=0)


def test_learned_decays_start_as_rwkv5s():
    for layer, power in ((0, 0.7), (2, 2.0)):
        w = gate_of("learned_decay", layer).w.tolist()
        assert w == pytest.approx([-6 + 5 * (n / 11) ** power for n in range(12)], abs=1e-5)


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"name": "data_dependent_scalar", "tau": 0.0}, "model.gate.tau: got 0.0, takes a number above 0"),
        ({"name": "data_dependent_full_rank", "tau": float("inf")}, "model.gate.tau: got inf, takes a number above 0"),
        ({"name": "mamba2", "dt_min": 0.0}, "model.gate.dt_min: got 0.0, takes a number above 0"),
        ({"name": "mamba2", "dt_max": 1e-4}, "model.gate.dt_min: got 0.001, takes at most model.gate.dt_max, 0.0001"),
        ({"name": "learned_decay", "fastest": 88.0}, "model.gate.fastest: got 88.0, takes a number from -20 to 5"),
        ({"name": "learned_decay", "slowest": float("nan")}, "model.gate.slowest: got nan, takes a number from -20"),
        ({"name": "learned_decay", "slowest": 0.0}, "model.gate.slowest: got 0.0, takes at most model.gate.fastest"),
        ({"name": "hgrn2", "tau": 1.0}, "model.gate.tau: gate 'hgrn2' has no such option"),
    ],
    ids=str,
)
def test_options_that_no_gate_can_have_are_refused(gate, told):
    with pytest.raises(ConfigError) as error:
        check_model(ModelConfig(gate=gate))
    assert told in str(error.value)


@pytest.mark.parametrize("name", built_in_gates())
def test_vectors_of_a_gate_are_no_matrices_to_decay(name):
    """Of a parameter with two dimensions weight decay and `flops_per_token` take it that each token meets it."""
    gate = gate_of(name)
    weights = {id(module.weight) for module in gate.modules() if isinstance(module, torch.nn.Linear)}
    assert all(p.ndim == 1 or id(p) in weights for p in gate.parameters())


def test_one_of_each_kind_leaves_no_kind_out():
    kept = one_of_each_kind()
    assert {GATES[name].decay_shape for name in kept} == {GATES[name].decay_shape for name in built_in_gates()}
    assert {"mamba2", "hgrn2"} <= set(kept) < set(built_in_gates())
