"""What mixes tokens: softmax attention, rotary positions and the short convolution, each against the plainest form."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gla_ablate.config import ModelConfig
from gla_ablate.model import GATES, Gate, GateShape, build_model, check_model, register_gate
from gla_ablate.model import mixer as mixers
from gla_ablate.model.rotary import rotate, rotations
from gla_ablate.model.short_conv import ShortConv
from gla_ablate.model.softmax import SoftmaxMixer, attend
from tests.registries import one_of_each_kind

SMALL = {"dim": 32, "layers": 4, "heads": 2, "chunk_size": 16}
HYBRID = {"mixer": ["gla", "gla", "softmax"], "short_conv": 3, "rope": True, "window": 9}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(**options):
    return build_model(check_model(ModelConfig(**SMALL | options)), vocab_size=19)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q, k, v [B,H,T,D], token by token."""
    rows = []
    for t in range(q.shape[2]):
        seen = slice(max(t + 1 - window, 0), t + 1)
        scores = (q[:, :, t, None] * k[:, :, seen]).sum(-1) / math.sqrt(q.shape[-1])  # [B, H, tokens seen]
        rows.append((scores.softmax(-1)[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 128, 200])
@pytest.mark.parametrize("window", [None, 1, 2, 63, 64, 65, 100, 1000])
def test_attention_and_its_gradients_are_those_of_the_plain_form(length, window):
    inputs = [normal(2, 3, length, 8, seed=i).requires_grad_() for i in range(3)]
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    o, expected = attend(*inputs, window), naive_attention(*plain, window or length)
    torch.testing.assert_close(o, expected)
    do = normal(*o.shape, seed=4)
    for grad, wanted in zip(torch.autograd.grad(o, inputs, do), torch.autograd.grad(expected, plain, do), strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("window", [None, 5])
def test_softmax_layer_is_rotated_attention_between_its_projections(window):
    config = check_model(ModelConfig(dim=32, mixer="softmax", softmax_heads=4, window=window))
    mixer, x = SoftmaxMixer(config).double(), normal(2, 20, 32)
    q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

    def turned(y: Tensor) -> Tensor:  # as complex numbers
        speed = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        angle = torch.arange(20, dtype=torch.float64)[:, None] * speed
        z = torch.complex(y[..., :4].contiguous(), y[..., 4:].contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    o = naive_attention(turned(q), turned(k), v, window or 20)
    torch.testing.assert_close(mixer(x), mixer.out_proj(o.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [0, 1000, 2**20])
def test_rotated_products_depend_on_the_distance_alone_however_far_along(far, dtype):
    q, k = normal(1, 9, 2, 16).to(dtype), normal(1, 9, 2, 16, seed=1).to(dtype)

    def products(start: int) -> Tensor:
        turn = rotations(start, q)
        return torch.einsum("bthd,bshd->bhts", rotate(q, *turn), rotate(k, *turn))

    tolerance = 1e-8 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(products(far), products(0), rtol=tolerance, atol=tolerance)


def test_rotation_keeps_lengths_and_leaves_the_first_token():
    x = normal(2, 9, 2, 16)
    y = rotate(x, *rotations(0, x))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, 0], x[:, 0])
    assert not torch.isclose(y[:, 1:], x[:, 1:]).all()


def test_keys_turn_as_the_recurrence_sees_them_also_where_a_gate_replaces_them(monkeypatch, scratch_registry):
    @register_gate("ties")
    class Ties(Gate):
        decay_shape = "none"

        def __init__(self, shape):
            super().__init__()

        def forward(self, x):
            return None

        def transform(self, g, k, v):
            return torch.ones_like(k), v

    mixer = model_of(rope=True, gate={"name": "ties"}).blocks[0].mixer
    seen = []
    monkeypatch.setattr(mixers, "gated_linear_attention", lambda q, k, v, g, **options: (seen.append(k), (v, None))[1])
    mixer(normal(1, 9, 32).float())
    ones = torch.ones(1, 9, 2, 8)
    torch.testing.assert_close(seen[0], rotate(ones, *rotations(0, ones)))


def test_angles_do_not_suffer_under_autocast():
    x = torch.ones(1, 4, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        cast = rotations(2**20 - 4, x)
    assert all(torch.equal(a, b) for a, b in zip(cast, rotations(2**20 - 4, x), strict=True))
    assert cast[0].dtype == torch.float32


@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_short_convolution_is_a_sum_over_the_last_tokens(width):
    conv, x = ShortConv(6, width).double(), normal(2, 5, 6)
    with torch.no_grad():
        conv.weight.copy_(normal(6, width, seed=1))
    for t in range(5):
        seen = [(conv.weight[:, width - 1 - back], x[:, t - back]) for back in range(min(width, t + 1))]
        torch.testing.assert_close(conv(x)[:, t], F.silu(sum(w * y for w, y in seen)))


@pytest.mark.parametrize("options", [{"mixer": "softmax"}, {"mixer": "softmax", "window": 5}, HYBRID], ids=str)
def test_a_later_token_changes_no_earlier_logits(options):
    model = model_of(**options)
    tokens = torch.randint(19, (2, 80), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[:, 50] = (changed[:, 50] + 1) % 19
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :50], after[:, :50])
    assert not torch.isclose(before[:, 50:], after[:, 50:]).all()


def test_a_token_outside_the_windows_of_all_layers_is_not_seen():
    model = model_of(mixer="softmax", window=3)  # four layers look 4 · 2 tokens back
    tokens = torch.randint(19, (1, 80), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[:, 50] = (changed[:, 50] + 1) % 19
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, 59:], after[:, 59:])
    assert not torch.isclose(before[:, 58], after[:, 58]).all()


@pytest.mark.parametrize("name", one_of_each_kind())
def test_options_leave_the_weights_and_gates_of_the_other_layers_alone(name):
    gate = {"name": name}
    plain, hybrid = model_of(gate=gate).state_dict(), model_of(gate=gate, **HYBRID).state_dict()
    shared = [key for key in plain if not key.startswith("blocks.2.mixer.")]
    assert all(torch.equal(plain[key], hybrid[key]) for key in shared)
    new = {key.partition(".mixer.")[2] for key in hybrid if key not in plain}
    if GATES[name].own_keys:  # none of its layers project keys: the softmax layer does
        assert new == {"q_conv.weight", "v_conv.weight", "k_proj.weight"}
    else:
        assert new == {f"{x}_conv.weight" for x in "qkv"}


def test_all_weights_of_a_hybrid_are_drawn_at_the_scale_of_their_fan_in():
    model = build_model(check_model(ModelConfig(dim=128, mixer=["gla", "softmax"], short_conv=4)), vocab_size=256)
    for layer, last in ((0, "gla"), (1, "softmax")):
        mixer = model.blocks[layer].mixer
        assert mixer.q_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05), last
        assert mixer.out_proj.weight.std().item() == pytest.approx(128**-0.5 / 2, rel=0.05), last
    assert model.blocks[0].mixer.k_conv.weight.std().item() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("options", [{"mixer": "softmax"}, HYBRID], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [0, 1, 30])
def test_every_weight_gets_a_finite_gradient(options, autocast, length):
    model = model_of(**options)
    tokens = torch.randint(19, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(tokens)
    assert logits.shape == (2, length, 19)
    logits.float().logsumexp(-1).sum().backward()
    assert length == 0 or all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_hybrid_compiles_without_a_graph_break():
    model = model_of(**HYBRID)
    tokens = torch.randint(19, (2, 30), generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
    compiled(tokens).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("stated", "gives", "got"),
    [
        ("[B,T,H]", lambda x: None, "None"),
        ("none", lambda x: -x[..., :2].abs(), "[1, 5, 2]"),
        ("[H]", lambda x: -x[..., :2].abs(), "[1, 5, 2]"),
        ("[B,T,H]", lambda x: -torch.ones(2), "[2]"),
        ("[B,T,H]", lambda x: (-x[..., :2].abs(), -x[..., :2].abs()), "[1, 5, 2], [1, 5, 2]"),
        ("[B,T,H,K], [B,T,H,V]", lambda x: -x.unflatten(-1, (2, -1)).abs(), "[1, 5, 2, 8]"),
    ],
    ids=["no return", "instead of none", "more than a head's", "less than a token's", "two", "one of two"],
)
def test_a_gate_that_gives_another_shape_than_it_states_is_told(stated, gives, got, scratch_registry):
    """Else a forgotten `return` would train, and be reported, as a gate."""

    @register_gate("other")
    class Other(Gate):
        decay_shape = stated

        def __init__(self, shape: GateShape) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Any:
            return gives(x)

    config = check_model(ModelConfig(dim=16, layers=1, heads=2, gate={"name": "other"}))
    model = build_model(config, vocab_size=17, seed=0)
    with pytest.raises(ValueError, match=re.escape(f"gate Other: gave {got}, states decay_shape {stated!r}")):
        model(torch.zeros(1, 5, dtype=torch.long))


def test_a_gate_may_say_that_it_has_none_on_values(scratch_registry):
    gates = [register_gate(name)(type(name, (Gate,), {
        "decay_shape": "[B,T,H]",
        "__init__": lambda self, shape: Gate.__init__(self),
        "forward": lambda self, x, gives=gives: gives(-x[..., :2].abs()),
    })) for name, gives in (("Alone", lambda g: g), ("Pair", lambda g: (g, None)))]  # fmt: skip
    models = [
        build_model(check_model(ModelConfig(dim=16, layers=1, heads=2, gate={"name": gate.__name__})), 17, seed=0)
        for gate in gates
    ]
    tokens = torch.arange(5)[None]
    assert torch.equal(*(model(tokens) for model in models))
