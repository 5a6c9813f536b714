"""Decoding as a CUDA graph: the same tokens, wherever a step can be one, and step by step elsewhere."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gla_ablate import replay
from gla_ablate.config import ModelConfig
from gla_ablate.generate import generate
from gla_ablate.model import GATES, LanguageModel, build_model, check_model, load_plugins, plugins
from gla_ablate.replay import Replayed, cast_projections, replayable, stepper
from tests.trained import gate_per_head

SMALL = ModelConfig(dim=32, layers=2, heads=2, chunk_size=16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(GATES, "_classes", dict(GATES._classes))
    monkeypatch.setattr(plugins, "_sha256", {})


def model_with(**options) -> LanguageModel:
    return build_model(check_model(replace(SMALL, **options)), 256, seed=1).to(DEVICE).eval()


WAITING = gate_per_head(
    "waiting",
    """
    def transform(self, g, k, v):
        return (k if g.mean().item() < 1 else 2 * k), v
""",
)

PROMPT = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(2))


def greedy(model: LanguageModel, n: int = 12) -> torch.Tensor:
    """[B,n]"""
    return torch.stack(list(generate(model, PROMPT, n, temperature=0)), 1)


@pytest.mark.parametrize("gate", GATES.names())
@pytest.mark.parametrize("tied", [False, True])
def test_cast_projections_give_what_autocast_gives(gate, tied):
    model = model_with(gate={"name": gate}, tie_embeddings=tied, short_conv=3)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        want = model(PROMPT.to(DEVICE))
        cast_projections(model, torch.bfloat16)
        assert torch.equal(model(PROMPT.to(DEVICE)), want)
    narrow = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert "head.weight" in narrow and "blocks.1.ffn.down_proj.weight" in narrow
    assert not any("norm" in name or "embedding" in name for name in narrow)


def test_a_users_gate_keeps_its_weights(tmp_path, scratch_registry):
    (tmp_path / "gate.py").write_text(WAITING)
    load_plugins([tmp_path / "gate.py"])
    model = model_with(gate={"name": "waiting"})
    cast_projections(model, torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if ".gate." in name} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"gate": {"name": "none"}, "short_conv": 3}, True),
        ({"rope": True}, False),
        ({"mixer": "softmax"}, False),
        ({"mixer": ["gla", "softmax"]}, False),
    ],
)
def test_a_step_that_knows_its_position_is_not_replayed(options, same, monkeypatch):
    model = model_with(**options)
    assert replayable(model) is (same and DEVICE == "cuda")
    assert isinstance(stepper(model, model.new_cache(1, 9)), Replayed) is replayable(model)


class Bounded:
    """A step that counts its calls, and a graph that needs no GPU: it calls the step again, on the token it was
    captured with, whose content may change."""

    def __init__(self, monkeypatch, breaks: bool = False) -> None:
        self.calls = self.replays = 0
        outer = self

        class Graph:
            def replay(self) -> None:
                outer.replays += 1
                outer.logits.copy_(2.0 * outer.token)

        class Capture:
            def __init__(self, graph) -> None: ...

            def __enter__(self) -> None: ...

            def __exit__(self, *error) -> None:
                if breaks:
                    raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(replay, "own_generator", lambda device: nullcontext())

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.token, self.logits = token, 2.0 * token
        return self.logits


@pytest.mark.parametrize(("breaks", "calls", "replays"), [(False, 2, 4), (True, 6, 0)])
def test_the_first_token_is_run_the_others_are_replayed_or_run(breaks, calls, replays, monkeypatch):
    step = Bounded(monkeypatch, breaks)
    replayed = Replayed(step)
    got = [replayed(torch.tensor([i, i + 1])).tolist() for i in range(5)]
    assert got == [[2 * i, 2 * i + 2] for i in range(5)]
    assert (step.calls, step.replays) == (calls, replays)  # a capture calls the step, too


@on_gpu
@pytest.mark.parametrize("gate", GATES.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_tokens_are_those_of_steps(gate, dtype, monkeypatch):
    model = model_with(gate={"name": gate}, short_conv=3)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = greedy(model)
        monkeypatch.setattr("gla_ablate.replay.replayable", lambda model: False)
        assert torch.equal(got, greedy(model))


@on_gpu
def test_a_gate_that_waits_for_the_gpu_is_run_step_by_step(tmp_path, scratch_registry, monkeypatch):
    (tmp_path / "gate.py").write_text(WAITING)
    load_plugins([tmp_path / "gate.py"])
    model = model_with(gate={"name": "waiting"})
    torch.manual_seed(5)
    before = torch.randn(3, device="cuda")
    torch.manual_seed(5)
    got = greedy(model)
    assert torch.equal(torch.randn(3, device="cuda"), before)  # which a failed capture would have broken
    monkeypatch.setattr("gla_ablate.replay.replayable", lambda model: False)
    assert torch.equal(got, greedy(model))
