"""Decoding from a cache: what a model says token by token is what it says of the whole sequence."""

from __future__ import annotations

from itertools import accumulate, pairwise, product

import pytest
import torch

from gla_ablate.config import ModelConfig
from gla_ablate.model import build_model, check_model
from tests.registries import one_of_each_kind

LENGTH = 50
SPLITS = {
    "token by token": [1] * LENGTH,
    "prompt, then tokens": [30] + [1] * 20,
    "prompt in two pieces, then tokens": [13, 20] + [1] * 17,
    "token, then pieces": [1, 3, 40, 6],
}
MIXERS = {
    "gla": {"mixer": "gla"},
    "hybrid": {"mixer": ["gla", "softmax"]},
    "hybrid, window": {"mixer": ["softmax", "gla", "gla"], "window": 7},
}
WINDOWS = [None, 1, 2, 7, 49, 50, 64]


def model_of(dtype: torch.dtype = torch.float32, **options):
    config = ModelConfig(dim=32, layers=3, heads=2, chunk_size=16, **options)
    return build_model(check_model(config), vocab_size=19).to(dtype)


def tokens() -> torch.Tensor:
    return torch.randint(19, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def in_pieces(model, sizes: list[int], length: int = LENGTH) -> torch.Tensor:
    cache = model.new_cache(2, length)
    ends = [0, *accumulate(sizes)]
    return torch.cat([model(tokens()[:, a:b], cache) for a, b in pairwise(ends)], 1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("gate", "short_conv", "rope", "mixer"),
    [
        *product(["data_dependent"], [0, 1, 4], [False, True], MIXERS),
        *product(sorted({*one_of_each_kind()} - {"data_dependent"}), [4], [True], ["gla"]),
    ],
)
def test_logits_from_a_cache_are_those_of_the_whole_sequence(gate, short_conv, rope, mixer):
    model = model_of(gate={"name": gate}, short_conv=short_conv, rope=rope, **MIXERS[mixer])
    whole = model(tokens())
    for name in ("prompt, then tokens", "prompt in two pieces, then tokens"):
        assert error(in_pieces(model, SPLITS[name]), whole) < 1e-5, name


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_a_cache_adds_nothing_but_rounding(mixer, sizes):
    model = model_of(torch.float64, short_conv=4, rope=True, **MIXERS[mixer])
    assert error(in_pieces(model, sizes), model(tokens())) < 1e-12


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_a_window_is_the_same_from_a_cache(window, sizes):
    model = model_of(torch.float64, mixer="softmax", window=window)
    assert error(in_pieces(model, sizes), model(tokens())) < 1e-12


@pytest.mark.parametrize("first", [1, 6, 7, 8, 14, 30])
def test_a_window_goes_on_right_after_a_prompt_of_any_length(first):
    model = model_of(torch.float64, mixer="softmax", window=7)
    sizes = [first, 2, 1, 7, 1, 8, 1]
    found = in_pieces(model, sizes, length=7)  # of any length, since the window isn't longer
    assert error(found, model(tokens()[:, : sum(sizes)])) < 1e-12


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_memory_is_taken_once(options):
    model = model_of(short_conv=4, rope=True, **options)
    cache = model.new_cache(2, LENGTH)

    def tensors() -> list[torch.Tensor]:
        kept = [value for entry in cache for value in vars(entry).values()]
        kept += [x for value in kept if isinstance(value, dict) for x in value.values()]
        return [x for x in kept if isinstance(x, torch.Tensor)]

    before = [(x.data_ptr(), x.shape) for x in tensors()]
    assert before
    model(tokens()[:, :20], cache)
    model(tokens()[:, 20:21], cache)
    assert [(x.data_ptr(), x.shape) for x in tensors()] == before
    assert not any(x.requires_grad for x in tensors())


def test_a_softmax_cache_holds_as_many_tokens_as_are_seen():
    shapes = {
        window: model_of(mixer="softmax", window=window, softmax_heads=4).new_cache(3, 20)[0].k.shape
        for window in (None, 5, 100)
    }
    assert shapes == {None: (3, 4, 20, 8), 5: (3, 4, 5, 8), 100: (3, 4, 20, 8)}


@pytest.mark.parametrize("window", [None, 100])
def test_more_tokens_than_a_cache_holds_are_refused(window):
    model = model_of(mixer=["gla", "softmax"], window=window)
    cache = model.new_cache(2, 20)
    model(tokens()[:, :20], cache)
    with pytest.raises(ValueError, match="cache: made for 20 tokens, has 20 and got 1 more"):
        model(tokens()[:, 20:21], cache)


@pytest.mark.parametrize(("batch", "length", "named"), [(0, 5, "batch: got 0"), (1, 0, "length: got 0")])
def test_an_empty_cache_is_refused(batch, length, named):
    with pytest.raises(ValueError, match=named):
        model_of().new_cache(batch, length)


def test_a_cache_under_autocast_keeps_keys_in_its_dtype_and_states_in_fp32():
    model = model_of(mixer=["gla", "softmax"], short_conv=4, rope=True)
    with torch.autocast("cpu", torch.bfloat16):
        recurrent, softmax, _ = model.new_cache(2, LENGTH)
        whole, pieces = model(tokens()), in_pieces(model, SPLITS["prompt in two pieces, then tokens"])
    assert recurrent.state.dtype == torch.float32
    assert recurrent.inputs["q"].dtype == softmax.k.dtype == softmax.v.dtype == torch.bfloat16
    assert error(pieces.float(), whole.float()) < 2e-2


def test_sequences_of_a_batch_do_not_see_each_other():
    model = model_of(mixer=["gla", "softmax"], short_conv=4)
    together = in_pieces(model, SPLITS["prompt, then tokens"])
    cache = model.new_cache(1, LENGTH)
    alone = torch.cat([model(tokens()[1:, :30], cache), *(model(t, cache) for t in tokens()[1:, 30:].split(1, 1))], 1)
    assert error(alone, together[1:]) < 1e-5
