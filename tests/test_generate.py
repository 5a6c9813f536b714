"""Decoding in Python: what is drawn, and that it is the chunkwise model, token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gla_ablate import generate as generating
from gla_ablate.config import ModelConfig
from gla_ablate.generate import generate, prefill, sample
from gla_ablate.model import build_model, check_model, load_plugins
from tests.registries import one_of_each_kind
from tests.trained import gate_per_head

TINY = ModelConfig(dim=32, layers=2, heads=2, chunk_size=16)
EXAMPLE = Path(__file__).parent / "model" / "example_gate.py"
BUILT_IN = one_of_each_kind()


def model_with(gate: str = "data_dependent", dtype: torch.dtype = torch.float64, vocab_size: int = 256):
    return build_model(check_model(replace(TINY, gate={"name": gate})), vocab_size, seed=1).to(dtype).eval()


def prompts(batch: int, length: int, vocab_size: int = 256) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(2))


def drawn(*arguments, **options) -> torch.Tensor:
    """All tokens, int64 [B,n]."""
    return torch.stack(list(generate(*arguments, **options)), 1)


PER_HEAD = gate_per_head(
    "a_head_and_token",
    """
    def transform(self, g, k, v):
        return k * (1 - g.exp())[..., None].to(k.dtype), v
""",
)


@pytest.mark.parametrize("gate", [*BUILT_IN, "my_decay", "a_head_and_token"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_every_way_to_cut_a_text_gives_the_same_distributions(gate, dtype, tolerance, tmp_path, scratch_registry):
    """All at once as in training, token by token, and in pieces; a gate's own fp32 is the limit of fp64."""
    (tmp_path / "gate.py").write_text(PER_HEAD)
    load_plugins([EXAMPLE, tmp_path / "gate.py"])
    model, tokens = model_with(gate, dtype), prompts(3, 45)
    with torch.no_grad():
        want = model(tokens).log_softmax(-1)
        for cuts in ([1] * 45, [37, 8], [1, 43, 1], [16, 16, 13], [45]):
            cache = model.new_cache(3, 45)
            got = torch.cat([model(piece, cache=cache) for piece in tokens.split(cuts, dim=1)], 1)
            torch.testing.assert_close(got.log_softmax(-1), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate", [*BUILT_IN, "a_head_and_token"])
def test_in_bf16_the_distributions_are_the_same_within_its_rounding(gate, tmp_path, scratch_registry):
    (tmp_path / "gate.py").write_text(PER_HEAD)
    load_plugins([tmp_path / "gate.py"])
    model, tokens = model_with(gate, torch.float32), prompts(3, 45)
    with torch.no_grad():
        exact = model(tokens).log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            cache = model.new_cache(3, 45)
            pieces = [model(piece, cache=cache) for piece in tokens.split([30, *[1] * 15], dim=1)]
    got = torch.cat(pieces, 1).float().log_softmax(-1)
    assert (got - exact).norm() < 1e-2 * exact.norm()
    drifts = (got - exact).square().mean((0, 2)).sqrt()
    assert drifts[30:].max() < 2 * drifts[:30].max()  # token by token nothing adds up


@pytest.mark.parametrize("mixer", ["gla", "softmax"])
def test_autocast_leaves_a_model_in_fp64_alone(mixer):
    model, tokens = build_model(check_model(replace(TINY, mixer=mixer)), 256, seed=1).double().eval(), prompts(2, 9)
    with torch.no_grad():
        want = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            cache = model.new_cache(2, 9)
            got = torch.cat([model(piece, cache=cache) for piece in tokens.split([6, 1, 2], dim=1)], 1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of a GPU have tests of their own")
@pytest.mark.parametrize("gate", [*BUILT_IN, "a_head_and_token"])
def test_the_kernels_go_on_as_plain_pytorch_does(gate, tmp_path, scratch_registry):
    """In Triton's interpreter: the chunkwise kernel for the prompt, the step kernel from there."""
    (tmp_path / "gate.py").write_text(PER_HEAD)
    load_plugins([tmp_path / "gate.py"])
    config, tokens = check_model(replace(TINY, layers=1, gate={"name": gate})), prompts(2, 23)
    model = build_model(replace(config, backend="triton"), 256, seed=1)
    with torch.no_grad():
        want = build_model(config, 256, seed=1)(tokens).log_softmax(-1)
        cache = model.new_cache(2, 23)
        got = torch.cat([model(piece, cache=cache) for piece in tokens.split([20, 1, 1, 1], dim=1)], 1)
    torch.testing.assert_close(got.log_softmax(-1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", BUILT_IN)
def test_greedy_tokens_are_those_of_the_whole_text_each_time(gate):
    model, tokens = model_with(gate), prompts(2, 20)
    for token in generate(model, tokens, 12, temperature=0):
        with torch.no_grad():
            assert torch.equal(token, model(tokens)[:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], 1)
    assert tokens.shape == (2, 32)


def held(cache) -> list[torch.Tensor]:
    """The tensors of a list of layers' caches."""
    parts = [part for layer in cache for part in ([layer] if isinstance(layer, torch.Tensor) else vars(layer).values())]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def test_nothing_grows_with_the_tokens():
    model = model_with(dtype=torch.float32)
    cache = model.new_cache(2, 1000)
    before = [(x.data_ptr(), x.shape, x.dtype) for x in held(cache)]
    with torch.no_grad():
        for length in (40, 1, 1, 7):
            model(prompts(2, length), cache=cache)
    assert [(x.data_ptr(), x.shape, x.dtype) for x in held(cache)] == before
    assert [what for _, *what in before] == [[(2, 2, 8, 16), torch.float32]] * 2


@pytest.mark.parametrize("piece", [2, 7, 16, 1000])
def test_a_prompt_in_pieces_is_the_prompt(piece, monkeypatch):
    model, tokens = model_with(), prompts(2, 50)
    with torch.no_grad():
        want = model(tokens)[:, -1]
        monkeypatch.setattr(generating, "PIECE", piece)
        lengths = []
        hidden = model.hidden
        monkeypatch.setattr(model, "hidden", lambda x, cache: lengths.append(x.shape[1]) or hidden(x, cache))
        torch.testing.assert_close(prefill(model, tokens, model.new_cache(2, 50)), want, rtol=1e-6, atol=1e-6)
    assert max(lengths) <= max(piece // 2, 1) and sum(lengths) == 50


def test_seeds_repeat_and_differ_and_leave_torchs_generator_alone():
    model, tokens = model_with(dtype=torch.float32), prompts(2, 9)
    before = torch.get_rng_state()
    first, again, other = (drawn(model, tokens, 30, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # nor do the sequences of a batch draw alike
    assert torch.equal(torch.get_rng_state(), before)


def frequencies(logits: list[float], **options) -> torch.Tensor:
    many = torch.tensor([logits]).repeat(200_000, 1)
    random = torch.Generator().manual_seed(0)
    token = sample(many, options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"), random)
    return torch.bincount(token, minlength=len(logits)) / len(many)


LOGITS = [0.5, -1.0, 2.0, 1.0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0, 1e9])
def test_tokens_are_drawn_from_the_softmax_at_a_temperature(temperature):
    want = (torch.tensor(LOGITS) / temperature).softmax(0)
    torch.testing.assert_close(frequencies(LOGITS, temperature=temperature), want, rtol=0, atol=5e-3)


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-40, 1e-9])
def test_near_no_temperature_the_most_probable_token_is_certain(temperature):
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}):
        assert frequencies(LOGITS, temperature=temperature, **options).tolist() == [0, 0, 1, 0]


def test_the_lowest_temperature_still_draws_between_equals():
    got = frequencies([2.0, 2.0, 0.0], temperature=5e-324)
    torch.testing.assert_close(got, torch.tensor([0.5, 0.5, 0.0]), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [2]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.01}, [2]),  # the first alone has more
        ({"top_p": 0.7}, [2, 3]),  # of 0.61, 0.23, 0.14, 0.03
        ({"top_p": 0.83}, [2, 3]),
        ({"top_p": 0.84}, [0, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.85}, [2, 3]),  # without the last they are 0.63, 0.23, 0.14
    ],
)
def test_what_is_left_to_draw_from_keeps_its_ratios(options, kept):
    p = torch.zeros(4)
    p[kept] = torch.tensor(LOGITS)[kept].softmax(0)
    got = frequencies(LOGITS, **options)
    torch.testing.assert_close(got, p, rtol=0, atol=5e-3)
    assert got.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"tokens: got torch.int64 \[1, 0\], takes int64 \[B, T\]"),
        ({"tokens": torch.zeros(4, dtype=torch.long)}, r"tokens: got torch.int64 \[4\]"),
        ({"tokens": torch.zeros(1, 4)}, r"tokens: got torch.float32"),
        ({"tokens": torch.tensor([[3, 256]])}, "tokens: got token 256, takes 0 to 255"),
        ({"tokens": torch.tensor([[3, -1]])}, "tokens: got token -1, takes 0 to 255"),
        ({"n": -1}, "n: got -1"),
        ({"temperature": -0.5}, "temperature: got -0.5"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_p": float("nan")}, "top_p: got nan"),
        ({"tokens": [[1, 2]]}, "tokens: got list"),
        ({"n": 2.5}, "n: got 2.5"),
        ({"temperature": "a"}, "temperature: got 'a'"),
        ({"top_k": 2.5}, "top_k: got 2.5"),
        ({"seed": 2**70}, "seed: got 1180591620717411303424"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_before_anything_is_drawn(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": model_with(), "tokens": prompts(1, 4), "n": 3} | change)


def test_weights_that_have_diverged_are_told():
    model = model_with(dtype=torch.float32)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the weights have diverged"):
        next(generate(model, prompts(1, 4), 1))


def test_no_tokens_are_no_work():
    assert list(generate(model_with(), prompts(1, 4), 0)) == []
