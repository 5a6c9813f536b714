"""What a model costs: parameters, recurrent state, FLOPs. From the config, without the memory that the model takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gla_ablate.config import ModelConfig
from gla_ablate.model.language_model import LanguageModel
from gla_ablate.model.shapes import build_gate, build_gates, ffn_width, key_width, value_width


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """All parameters, each counted once however many modules share it."""
    # real gates: they are small, and most of torch on the meta device loads its compiler
    gates = build_gates(config, seed=0)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(config, vocab_size, gates).parameters())


def counter() -> Callable[[ModelConfig, int], int]:
    """`count_parameters` that counts equal models once, which a grid has many of."""
    counted: dict[tuple[str, int], int] = {}

    def count(config: ModelConfig, vocab_size: int) -> int:
        key = repr(config), vocab_size
        if key not in counted:
            counted[key] = count_parameters(config, vocab_size)
        return counted[key]

    return count


def state_size(config: ModelConfig) -> int:
    """Numbers in the recurrent state of all layers for one sequence: layers · heads · K · V."""
    return config.layers * key_width(config) * value_width(config) // config.heads


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Floating-point operations per token of a training step, forward and backward: 3 × those of the matrix products of
    the forward pass. A product [m,k]·[k,n] counts 2mkn; the embedding look-up and elementwise work count nothing.

    Forward, with d the width, d_k = heads·K, d_v = heads·V, f the SwiGLU width and C = min(chunk_size, seq_len),
    with 64 for "auto", so that the count is the same on every machine:

        layers · [ 2d(2 d_k + 3 d_v) + 6 d f             projections and SwiGLU
                   + 2 · weights of the gate             each of its matrices meets each token once
                   + 4 d_k V + (C + 1)(d_k + d_v) ]      the op: state written and read; causal half of two C×C products
        + 2 d · vocab                                    output head
    """
    d, d_k, d_v = config.dim, key_width(config), value_width(config)
    gate = build_gate(config, layer=0, seed=0)
    gate_weights = sum(parameter.numel() for parameter in gate.parameters() if parameter.ndim >= 2)
    chunk = min(64 if config.chunk_size == "auto" else config.chunk_size, seq_len)
    layer = (
        2 * d * (2 * d_k + 3 * d_v)
        + 6 * d * ffn_width(config)
        + 2 * gate_weights
        + 4 * d_k * (d_v // config.heads)
        + (chunk + 1) * (d_k + d_v)
    )
    return 3.0 * (config.layers * layer + 2 * d * vocab_size)
