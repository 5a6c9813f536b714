from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gla_ablate.config import ModelConfig, fill
from gla_ablate.model import (
    GATES,
    build_model,
    check_model,
    count_parameters,
    flops_per_token,
    mixer,
    softmax,
    state_size,
)
from gla_ablate.ops import gated_linear_attention
from gla_ablate.yaml_io import read_yaml

PARTS = Path(__file__).parents[2] / "configs" / "model"


def part(name: str) -> ModelConfig:
    return check_model(fill(ModelConfig, read_yaml(PARTS / f"{name}.yaml")["model"]))


@pytest.mark.parametrize("path", sorted(PARTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_part_is_a_valid_model_and_says_what_it_is(path):
    assert path.read_text().startswith("# ")
    assert count_parameters(part(path.stem), vocab_size=256) > 0


@pytest.mark.parametrize(
    ("name", "tied", "millions"),
    [("340M", False, 374.5), ("340M", True, 341.7), ("1.3B", False, 1365.5)],
)
def test_parameters_of_the_papers_sizes(name, tied, millions):
    config = replace(part(name), tie_embeddings=tied)
    assert count_parameters(config, vocab_size=32_000) / 1e6 == pytest.approx(millions, rel=0.01)


def test_heads_of_the_340m_model_are_the_papers():
    config = part("340M")
    with torch.device("meta"):
        block = build_model(replace(config, layers=1), vocab_size=32).blocks[0]
    assert block.mixer.q_proj.out_features // config.heads == 128
    assert block.mixer.v_proj.out_features // config.heads == 256
    assert block.ffn.up_proj.out_features == 2816  # 8/3 · 1024 = 2730.7, up to a multiple of 256


@pytest.mark.parametrize("gate", GATES.names())
@pytest.mark.parametrize("tied", [False, True])
def test_count_is_that_of_the_model_itself(gate, tied):
    config = check_model(ModelConfig(dim=48, layers=3, heads=3, tie_embeddings=tied, gate={"name": gate}))
    assert count_parameters(config, 19) == sum(p.numel() for p in build_model(config, 19).parameters())


def test_state_size_is_that_of_the_op():
    config = ModelConfig(dim=48, layers=3, heads=2, expand_k=0.25)
    q, v = torch.zeros(1, 5, 2, 6), torch.zeros(1, 5, 2, 24)
    _, state = gated_linear_attention(q, q, v, output_final_state=True)
    assert state_size(config) == 3 * state.numel()


@pytest.mark.parametrize("gate", GATES.names())
def test_flops_are_those_that_torch_counts_outside_the_op(gate, monkeypatch):
    config = check_model(ModelConfig(dim=48, layers=3, heads=2, chunk_size=16, gate={"name": gate}))
    model, tokens = build_model(config, vocab_size=19), torch.zeros(2, 64, dtype=torch.long)
    monkeypatch.setattr(mixer, "gated_linear_attention", lambda q, k, v, g, **options: (v, None))
    with FlopCounterMode(display=False) as counted:
        model(tokens)
    key_dim, value_dim = 12, 24
    op = 4 * key_dim * value_dim + 17 * (key_dim + value_dim)  # a head, token and layer
    assert flops_per_token(config, 19, 64) == pytest.approx(3 * (counted.get_total_flops() / 128 + 3 * 2 * op))


@pytest.mark.parametrize("mixer", ["gla", "softmax", ["gla", "softmax"]], ids=str)
def test_count_of_other_mixers_is_that_of_the_model_itself(mixer):
    config = check_model(ModelConfig(dim=48, layers=3, heads=3, mixer=mixer, short_conv=4))
    assert count_parameters(config, 19) == sum(p.numel() for p in build_model(config, 19).parameters())


def test_transformer_has_as_many_parameters_as_gla_without_its_gate():
    gla, softmax = (count_parameters(ModelConfig(mixer=m, gate={"name": "none"}), 256) for m in ("gla", "softmax"))
    assert gla - 2 * 64 == softmax  # the norm of the heads


@pytest.mark.parametrize("window", [None, 5, 400])
def test_state_size_is_what_a_cache_holds_after_the_sequence(window):
    config = check_model(ModelConfig(dim=48, layers=4, heads=2, mixer=["gla", "softmax"], short_conv=3, window=window))
    kept = build_model(config, vocab_size=19).new_cache(1, 200)
    numbers = sum(entry.k.numel() + entry.v.numel() for entry in kept[1::2])
    numbers += sum(entry.state.numel() + sum(x.numel() for x in entry.inputs.values()) for entry in kept[::2])
    assert state_size(config, 200) == numbers


def test_state_of_softmax_layers_is_none_without_a_length():
    with pytest.raises(ValueError, match="seq_len: got None, takes a number of tokens"):
        state_size(ModelConfig(mixer="softmax"))


def test_flops_of_other_mixers_are_those_that_torch_counts_outside_the_products_of_attention(monkeypatch):
    config = check_model(ModelConfig(dim=48, layers=4, heads=2, mixer=["gla", "softmax"], short_conv=3, chunk_size=16))
    model, tokens = build_model(config, vocab_size=19), torch.zeros(2, 64, dtype=torch.long)
    monkeypatch.setattr(mixer, "gated_linear_attention", lambda q, k, v, g, **options: (v, None))
    monkeypatch.setattr(softmax, "attend", lambda q, k, v, window: v)
    with FlopCounterMode(display=False) as counted:
        model(tokens)
    op = 2 * (4 * 12 * 24 + 17 * (12 + 24))  # a token and layer of two heads
    products = 4 * 48 * 65 / 2  # a token sees 1, 2, …, 64
    assert flops_per_token(config, 19, 64) == pytest.approx(
        3 * (counted.get_total_flops() / 128 + 2 * op + 2 * products)
    )


def test_flops_of_the_head_are_of_the_tokens_that_have_a_target():
    every, quarter = (flops_per_token(ModelConfig(dim=32), 19, 64, share) for share in (1.0, 0.25))
    assert every - quarter == pytest.approx(3 * 0.75 * 2 * 32 * 19)


@pytest.mark.parametrize("window", [1, 2, 7, 63, 64, 65, 1000])
def test_flops_of_a_window_are_of_the_tokens_that_are_seen(window):
    def flops(window):
        return flops_per_token(ModelConfig(mixer="softmax", layers=1, dim=32, window=window), 19, 64)

    seen = sum(min(token, window) for token in range(1, 65)) / 64
    assert flops(None) - flops(window) == pytest.approx(3 * 4 * 32 * (65 / 2 - seen))


def test_flops_of_the_op_grow_with_the_chunk_until_it_holds_the_sequence():
    costs = [flops_per_token(ModelConfig(chunk_size=c), vocab_size=256, seq_len=64) for c in (16, 32, 64, 128, 256)]
    assert costs[0] < costs[1] < costs[2] == costs[3] == costs[4]


def test_an_automatic_chunk_counts_the_same_wherever_it_runs():
    automatic, fixed = (flops_per_token(ModelConfig(chunk_size=c), vocab_size=256, seq_len=256) for c in ("auto", 64))
    assert automatic == fixed


def test_checking_and_counting_load_neither_lightning_nor_torchs_compiler():
    """Either would take the seconds that a dry run has."""
    code = """
import sys
from gla_ablate.config import ModelConfig
from gla_ablate.model import GATES, check_model, count_parameters, flops_per_token
for name in GATES.names():
    config = check_model(ModelConfig(gate={"name": name}, mixer=["gla", "softmax"], short_conv=4, rope=True))
    count_parameters(config, 256), flops_per_token(config, 256, 256)
print(*{"lightning", "datasets", "torch._dynamo"} & set(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
