"""Which mixer each layer has, and the keys of the config that belong to one kind of layer alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from gla_ablate.config import ModelConfig
from gla_ablate.errors import ConfigError, nearest

MIXERS = ("gla", "softmax")
# The keys that layers of one kind alone read, with their values in a model without such a layer.
KEYS: dict[str, dict[str, Any]] = {
    "gla": {
        "heads": 1, "expand_k": 1.0, "expand_v": 1.0, "chunk_size": "auto", "gate": {"name": "none"},
        "short_conv": 0, "rope": False,
    },
    "softmax": {"window": None, "softmax_heads": "auto"},
}  # fmt: skip
OPTIONS = ("short_conv", "rope", "window", "softmax_heads")  # those that are set only where somebody wants them
HEAD_WIDTH = 64  # channels of a softmax head, at least
WIDEST_CONV = 1024


def mixers(config: ModelConfig) -> list[str]:
    """The name of each layer's mixer."""
    names = [config.mixer] if isinstance(config.mixer, str) else config.mixer
    return [names[layer % len(names)] for layer in range(config.layers)]


def softmax_heads(config: ModelConfig) -> int:
    """Heads of a softmax layer. "auto": as many as leave each an even number of channels, 64 or more, the width in
    FLA's Transformer++ at any size; one head below that."""
    if config.softmax_heads != "auto":
        return config.softmax_heads
    most = max(config.dim // HEAD_WIDTH, 1)
    return next((heads for heads in range(most, 0, -1) if config.dim % (2 * heads) == 0), 1)


def check_names(config: ModelConfig) -> None:
    """Raises `ConfigError` for a mixer that there isn't, and for no mixer or more than there are layers."""
    names = config.mixer if isinstance(config.mixer, list) else [config.mixer]
    for name in names:
        if name not in MIXERS:
            raise ConfigError(f"model.mixer: got {name!r}{nearest(name, MIXERS)} (valid: {', '.join(MIXERS)})")
    if not 1 <= len(names) <= config.layers:
        raise ConfigError(
            f"model.mixer: got {len(names)} names, takes from one to as many as model.layers, {config.layers}"
        )


def check_mixers(config: ModelConfig) -> ModelConfig:
    """`config`, which `check_names` has passed, with the shortest spelling of its mixers and without the keys of layers
    that it doesn't have: models that differ in those alone are the same.

    Raises `ConfigError`, with the dotted key, for a value that no model can have.
    """
    if config.window is not None and config.window < 1:
        raise ConfigError(f"model.window: got {config.window}, takes a whole number from 1, or null")
    if not 0 <= config.short_conv <= WIDEST_CONV:
        raise ConfigError(
            f"model.short_conv: got {config.short_conv}, takes a whole number from 0 (none) to {WIDEST_CONV}"
        )
    kinds = mixers(config)
    if "softmax" in kinds:
        check_softmax_heads(config)
    key_dim = round(config.dim * config.expand_k) // config.heads
    if config.rope and "gla" in kinds and key_dim % 2:
        raise ConfigError(
            f"model.rope: got true, which turns pairs of channels; a head of q and k has {key_dim} "
            "(dim · expand_k / heads), takes an even number"
        )
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    absent = {key: value for kind in MIXERS if kind not in kinds for key, value in KEYS[kind].items()}
    return dataclasses.replace(config, mixer=kinds[0] if period == 1 else kinds[:period], **absent)


def check_softmax_heads(config: ModelConfig) -> None:
    """Raises `ConfigError` if heads of a softmax layer are no whole, even number of channels wide."""
    given = config.softmax_heads
    if given != "auto" and (given < 1 or config.dim % given):
        raise ConfigError(
            f"model.softmax_heads: got {given}, takes auto, or a divisor of the model's width, {config.dim}"
        )
    width = config.dim // softmax_heads(config)
    if width % 2:
        key, value = ("dim", config.dim) if given == "auto" else ("softmax_heads", given)
        raise ConfigError(
            f"model.{key}: got {value}, which makes softmax heads of {width} channels; rotary positions turn pairs of "
            "channels, so they take an even number"
        )
