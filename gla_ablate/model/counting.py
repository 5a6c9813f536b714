"""What a model costs: parameters, recurrent state, FLOPs. From the config, without the memory that the model takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gla_ablate.config import ModelConfig
from gla_ablate.model.kinds import mixers
from gla_ablate.model.language_model import LanguageModel
from gla_ablate.model.shapes import build_gate, build_gates, ffn_width, key_width, projected_width, value_width


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


def state_size(config: ModelConfig, seq_len: int | None = None) -> int:
    """Numbers that all layers carry from token to token, for one sequence.

    A gla layer carries heads · K · V and the last short_conv − 1 inputs of its convolutions, at any length. A softmax
    layer carries the keys and values of the tokens that it sees, which grow with the sequence: counted is what it has
    after `seq_len` tokens, 2 · dim · min(seq_len, window). Raises `ValueError` for such a model without a `seq_len`.
    """
    d_k, d_v = key_width(config), value_width(config)
    total = 0
    for kind in mixers(config):
        if kind == "gla":
            total += d_k * d_v // config.heads + max(config.short_conv - 1, 0) * projected_width(config)
        elif seq_len is None:
            raise ValueError("seq_len: got None, takes a number of tokens for a model with softmax layers")
        else:
            total += 2 * config.dim * min(seq_len, config.window or seq_len)
    return total


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int, labelled_share: float = 1.0) -> float:
    """Floating-point operations per token of a training step, forward and backward: 3 × those of the matrix products of
    the forward pass. A product [m,k]·[k,n] counts 2mkn; the embedding look-up and elementwise work count nothing.

    Forward, with d the width, d_k = heads·K, d_v = heads·V, f the SwiGLU width and C = min(chunk_size, seq_len),
    with 64 for "auto", so that the count is the same on every machine; a gate that makes k itself has d_k once less in
    the projections and convolutions, and what a gate on values adds inside the op isn't counted:

        gla layers · [ 2d(2 d_k + 3 d_v) + 6 d f         projections and SwiGLU
                       + 2 · weights of the gate         each of its matrices meets each token once
                       + 2 · short_conv · (2 d_k + d_v)  the convolutions
                       + 4 d_k V + (C + 1)(d_k + d_v) ]  the op: state written and read; causal half of two C×C products
        + softmax layers · [ 8 d² + 6 d f                projections and SwiGLU
                             + 4 d · tokens seen ]       of two products: (seq_len + 1) / 2 on average, without a window
        + 2 d · vocab · labelled_share                   output head, of the tokens that have a target
    """
    kinds = mixers(config)
    d, ffn = config.dim, 6 * config.dim * ffn_width(config)
    total = 2.0 * d * vocab_size * labelled_share
    if gla := kinds.count("gla"):
        total += gla * (ffn + gla_flops(config, layer=kinds.index("gla"), seq_len=seq_len))
    if softmax := kinds.count("softmax"):
        total += softmax * (ffn + 8 * d * d + 4 * d * tokens_seen(seq_len, config.window))
    return 3.0 * total


def gla_flops(config: ModelConfig, layer: int, seq_len: int) -> int:
    """Of the mixer of one gla layer, per token, forward."""
    d, d_k, d_v = config.dim, key_width(config), value_width(config)
    gate = build_gate(config, layer, seed=0)
    gate_weights = sum(parameter.numel() for parameter in gate.parameters() if parameter.ndim >= 2)
    chunk = min(64 if config.chunk_size == "auto" else config.chunk_size, seq_len)
    projections = 2 * d * (projected_width(config) + 2 * d_v) + 2 * config.short_conv * projected_width(config)
    return projections + 2 * gate_weights + 4 * d_k * (d_v // config.heads) + (chunk + 1) * (d_k + d_v)


def tokens_seen(seq_len: int, window: int | None) -> float:
    """By a token of a causal sequence, itself included, on average."""
    window = min(window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * max(seq_len, 1))  # the first `window` tokens see 1, 2, …, window
