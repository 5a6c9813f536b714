"""Decoding as a CUDA graph: the same tokens, wherever a step can be one, and kernel by kernel elsewhere."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gla_ablate.config import ModelConfig
from gla_ablate.model import LanguageModel, build_model, check_model, load_plugins
from gla_ablate.replay import Replayed, cast_projections, same_for_every_token, stepper
from tests.registries import one_of_each_kind
from tests.trained import gate_per_head

SMALL = ModelConfig(dim=32, layers=2, heads=2, chunk_size=16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(2)).to(DEVICE)


@pytest.fixture
def users_gate(tmp_path, scratch_registry):
    """The name of one that is registered as long as the test runs."""
    (tmp_path / "gate.py").write_text(gate_per_head("a_users"))
    load_plugins([tmp_path / "gate.py"])
    return "a_users"


def model_with(**options) -> LanguageModel:
    """With norms that scale."""
    model = build_model(check_model(replace(SMALL, **options)), 256, seed=1).to(DEVICE).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.mark.parametrize("mixer", ["gla", ["gla", "softmax"]], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gate", one_of_each_kind())
def test_cast_projections_give_what_autocast_gives(gate, tied, mixer):
    model = model_with(gate={"name": gate}, tie_embeddings=tied, short_conv=3, mixer=mixer)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        want = model(TOKENS)
        cast_projections(model, torch.bfloat16)
        assert torch.equal(model(TOKENS), want)
    narrow = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {"head.weight", "blocks.1.ffn.down_proj.weight", "blocks.1.mixer.q_proj.weight"} <= narrow
    assert not any("norm" in name or "embedding" in name for name in narrow)


def test_a_users_gate_keeps_its_weights(users_gate):
    model = model_with(gate={"name": users_gate})
    cast_projections(model, torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if ".gate." in name} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "same"),
    [
        *(({"gate": {"name": gate}, "short_conv": 3}, True) for gate in one_of_each_kind()),
        ({"rope": True}, False),
        ({"mixer": "softmax"}, False),
        ({"mixer": ["gla", "softmax"]}, False),
    ],
    ids=str,
)
def test_a_step_that_knows_its_position_is_not_replayed(options, same):
    model = model_with(**options)
    assert same_for_every_token(model) is same
    assert isinstance(stepper(model, model.new_cache(1, 9)), Replayed) is (same and DEVICE == "cuda")


def test_what_python_may_do_in_a_step_is_not_left_out(users_gate):
    assert not same_for_every_token(model_with(gate={"name": users_gate}))
    model = model_with()
    hook = model.blocks[1].mixer.gate.register_forward_hook(lambda *_: None)
    assert not same_for_every_token(model)
    hook.remove()
    assert same_for_every_token(model)


class Doubling:
    """A step whose logits are twice the tokens, and in place of CUDA graphs one that doubles them without the step."""

    def __init__(self, monkeypatch) -> None:
        self.calls = self.replays = 0
        step = self

        class Graph:
            def replay(self) -> None:
                step.replays += 1
                step.logits.copy_(2.0 * step.token)

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", nullcontext)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.token, self.logits = token, 2.0 * token
        return self.logits


def test_the_first_token_is_run_and_the_others_are_replayed(monkeypatch):
    step = Doubling(monkeypatch)
    replayed = Replayed(step)
    assert [replayed(torch.tensor([i, i + 1])).tolist() for i in range(5)] == [[2 * i, 2 * i + 2] for i in range(5)]
    assert (step.calls, step.replays) == (2, 4)  # the capture is a call


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize(("autocast", "narrow"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("gate", one_of_each_kind())
def test_a_replayed_step_gives_the_logits_of_the_step_itself(gate, autocast, narrow):
    model = model_with(gate={"name": gate}, short_conv=3)
    if narrow:
        cast_projections(model, torch.bfloat16)
    caches = model.new_cache(3, 40), model.new_cache(3, 40)
    with torch.no_grad():
        step = stepper(model, caches[0])
        for token in TOKENS.T:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):  # what it casts goes with it
                got, want = step(token), model(token[:, None], cache=caches[1])[:, -1]
                torch.testing.assert_close(got, want, rtol=0, atol=1e-2 if autocast else 1e-5)
    assert step.graph is not None
