"""The widths that follow from a `ModelConfig`, and the check that a model can have them. Builds gates, no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from gla_ablate.config import ModelConfig
from gla_ablate.errors import ConfigError, nearest
from gla_ablate.model.gates import GATES, Gate, GateShape
from gla_ablate.model.initialise import seeded
from gla_ablate.model.kinds import check_mixers, check_names, mixers

BACKENDS = ("auto", "triton", "torch")
MAX_HEAD_DIM = 512  # the op's limit on K and V


def key_width(config: ModelConfig) -> int:
    """heads · K, the width of the query and key projections."""
    return round(config.dim * config.expand_k)


def value_width(config: ModelConfig) -> int:
    """heads · V, the width of the value projection and of the output gate."""
    return round(config.dim * config.expand_v)


def projected_width(config: ModelConfig) -> int:
    """That of q, k and v together, as far as a gla layer projects them: some gates make k themselves."""
    keys = 1 if GATES[config.gate["name"]].own_keys else 2
    return keys * key_width(config) + value_width(config)


def ffn_width(config: ModelConfig) -> int:
    """ffn_ratio · dim, rounded up to a multiple of `ffn_multiple`."""
    return math.ceil(config.ffn_ratio * config.dim / config.ffn_multiple) * config.ffn_multiple


def gate_shape(config: ModelConfig, layer: int) -> GateShape:
    return GateShape(
        dim=config.dim,
        heads=config.heads,
        key_dim=key_width(config) // config.heads,
        value_dim=value_width(config) // config.heads,
        layer=layer,
        layers=config.layers,
    )


def build_gate(config: ModelConfig, layer: int, seed: int) -> Gate:
    """The gate of one layer. What it draws on construction depends on the seed and the layer alone."""
    gate_class: Callable[..., Gate] = GATES[config.gate["name"]]
    options = {key: value for key, value in config.gate.items() if key != "name"}
    with seeded(seed, f"gate.{layer}"):
        return gate_class(gate_shape(config, layer), **options)


def build_gates(config: ModelConfig, seed: int) -> list[Gate | None]:
    """One gate a layer, on the CPU; None for a layer without, which softmax layers are."""
    kinds = mixers(config)
    if "gla" not in kinds:
        return [None] * config.layers
    with seeded(seed, "gate.shared"):
        shared = GATES[config.gate["name"]].build_shared(gate_shape(config, layer=0))
    gates = [build_gate(config, layer, seed) if kind == "gla" else None for layer, kind in enumerate(kinds)]
    for gate in gates:
        if gate is not None:
            gate.shared = shared
    return gates


def check_model(config: ModelConfig) -> ModelConfig:
    """`config` with the gate's options completed by their defaults, and its mixers as `check_mixers` spells them.

    Raises `ConfigError`, with the dotted key, for a value that no model can have.
    """
    for key in ("dim", "layers", "heads", "ffn_multiple"):
        if getattr(config, key) < 1:
            raise ConfigError(f"model.{key}: got {getattr(config, key)}, takes a whole number from 1")
    for key in ("expand_k", "expand_v", "ffn_ratio"):
        if not (math.isfinite(getattr(config, key)) and getattr(config, key) > 0):
            raise ConfigError(f"model.{key}: got {getattr(config, key)}, takes a number above 0")
    check_names(config)
    for key in ("expand_k", "expand_v") if "gla" in mixers(config) else ():
        _check_heads(config, key)
    if config.chunk_size not in ("auto", 16, 32, 64, 128, 256):
        raise ConfigError(f"model.chunk_size: got {config.chunk_size}, takes auto, 16, 32, 64, 128 or 256")
    if config.backend not in BACKENDS:
        hint = nearest(config.backend, BACKENDS)
        raise ConfigError(f"model.backend: got {config.backend!r}{hint} (valid: {', '.join(BACKENDS)})")
    return check_mixers(replace(config, gate=_check_gate(config)))


def _check_heads(config: ModelConfig, key: str) -> None:
    width = config.dim * getattr(config, key)
    if abs(width - round(width)) > 1e-6:  # dim · expand in floats: 30 · 0.1 = 3.0000000000000004
        raise ConfigError(
            f"model.{key}: got {getattr(config, key)}, takes a number that gives a whole width: "
            f"dim {config.dim} · {key} = {width:g}"
        )
    if round(width) % config.heads:
        raise ConfigError(
            f"model.heads: got {config.heads}, takes a divisor of {round(width)} "
            f"(dim · {key} = {config.dim} · {getattr(config, key):g})"
        )
    if round(width) // config.heads > MAX_HEAD_DIM:
        fewest = math.ceil(round(width) / MAX_HEAD_DIM)
        raise ConfigError(
            f"model.heads: got {config.heads}, which makes {round(width) // config.heads} channels a head "
            f"(dim · {key} / heads); the op takes up to {MAX_HEAD_DIM}, so at least {fewest} heads"
        )


def _check_gate(config: ModelConfig) -> dict:
    name = config.gate.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"model.gate.name: got {name!r}, takes one of {', '.join(GATES.names())}")
    if name not in GATES:
        raise ConfigError(
            f"model.gate.name: unknown gate {name!r}{nearest(name, GATES.names())} (valid: {', '.join(GATES.names())})"
        )
    options = {key: value for key, value in config.gate.items() if key != "name"}
    gate = {"name": name, **GATES.resolve(name, options, "model.gate")}
    try:  # only the gate itself knows which values of its options make sense
        build_gates(replace(config, gate=gate), seed=0)
    except ConfigError:
        raise
    except Exception as error:  # a plugin's gate is the user's: it can raise anything
        raise ConfigError(f"model.gate: gate {name!r} can't be built: {type(error).__name__}: {error}") from error
    return gate
