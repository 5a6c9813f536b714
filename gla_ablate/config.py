"""The whole schema of a trial, as dataclasses, and the way from plain values to it.

An experiment is this plus a grid (`experiment.py`). Values come in layers (parts, `set`, a grid point, the command
line): `merge` lays one over another, `interpolation` follows references between them, `resolve` checks what comes out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from gla_ablate.errors import ConfigError, nearest
from gla_ablate.registry import check_type
from gla_ablate.status import replace
from gla_ablate.yaml_io import read_yaml

T = TypeVar("T")


@dataclass
class ModelConfig:
    """The network. K = dim · expand_k / heads key channels and V = dim · expand_v / heads value channels a head.

    `heads`, `expand_k`, `expand_v`, `chunk_size`, `backend`, `gate`, `short_conv` and `rope` are of gla layers,
    `softmax_heads` and `window` of softmax layers. What belongs to a kind of layer that a model doesn't have changes
    nothing there.
    """

    dim: int = 128
    layers: int = 2
    heads: int = 2
    expand_k: float = 0.5
    expand_v: float = 1.0
    ffn_ratio: float = 8 / 3  # SwiGLU width / dim, before rounding up
    ffn_multiple: int = 32  # the SwiGLU width is rounded up to a multiple of this
    tie_embeddings: bool = False
    norm_eps: float = 1e-5  # of every RMSNorm; FLA's configs have 1e-6 by default
    # tokens a chunk of the op, or auto, the fastest: changes speed, never the result beyond rounding
    chunk_size: int | Literal["auto"] = "auto"
    backend: str = "auto"  # of the op: auto | triton | torch
    mixer: str | list[str] = "gla"  # of tokens: gla | softmax, or a list of them, repeated over the layers
    short_conv: int = 0  # tokens that a causal depthwise convolution with SiLU on q, k and v sees; 0: none
    rope: bool = False  # rotary positions on q and k, base 10000, which softmax layers always have
    softmax_heads: int | Literal["auto"] = "auto"  # each dim / softmax_heads wide; auto: 64 channels or more
    window: int | None = None  # tokens that a token sees, itself included; null: all before it
    gate: dict[str, Any] = field(default_factory=lambda: {"name": "data_dependent"})  # name and the gate's own options


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to `min_lr_ratio · lr`."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off


@dataclass
class TrainerConfig:
    """How long and how a trial runs."""

    max_steps: int = 200
    val_every: int = 50  # steps between validations; one always runs at the end
    log_every: int = 10
    max_time: float | None = None  # seconds of training in one go, after which a trial saves and ends "out of time"
    # micro-batches of data.batch_size / accumulate rows that make up the batch of a step, one after the other: less
    # memory, the same result beyond rounding
    accumulate: int = 1
    # auto: bf16-mixed where the device has it, else 32-true
    # bf16-true: weights and gradients in bf16 too, with fp32 masters (`masters.py`)
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    # torch.compile the network of a training step; auto: on a GPU, where that saves more time than it takes
    compile: bool | Literal["auto"] = "auto"
    # activation checkpointing (model/recompute.py); auto: elementwise where compiled, else none
    recompute: Literal["auto", "none", "elementwise", "block"] = "auto"
    # auto: ddp on several devices, where every one has all weights; fsdp: each keeps its share. On one, nothing
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    devices: int = 1  # of a node, each with a process and an equal part of data.batch_size; GPUs where there are any
    num_nodes: int = 1  # machines, on each of which torchrun or srun starts the processes

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes


@dataclass
class EvalConfig:
    """What else a trial is judged by once it has trained (`lengths.py`)."""

    # rows so many times data.seq_len long, each length on as many tokens as data.val_tokens allow; [] for none.
    # Multiples, since those travel with an axis over data.seq_len
    lengths: list[int] = field(default_factory=list)


@dataclass
class Config:
    """One trial, fully resolved: what `config.yaml` in its folder holds."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: dict[str, Any] = field(default_factory=lambda: {"name": "stdlib", "seq_len": 256, "batch_size": 8})
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    plugins: list[str] = field(default_factory=list)  # files that register gates, absolute


# Mappings that name a choice beside the options of that choice, with the keys that every choice has.
CHOICES: dict[str, tuple[str, ...]] = {"model.gate": (), "data": ("seq_len", "batch_size", "val_tokens")}

MANY = 10**12  # steps
# Numbers that no trial can have although their type is right: key → (what it takes, whether a value is that).
# Those of the model are far above any that trains: beyond them numbers overflow on the way, or the machine is full.
RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "model.dim": ("a whole number from 1 to 1,048,576", lambda x: 1 <= x <= 2**20),
    "model.layers": ("a whole number from 1 to 10,000", lambda x: 1 <= x <= 10_000),
    "model.heads": ("a whole number from 1 to 1,048,576", lambda x: 1 <= x <= 2**20),
    "model.expand_k": ("a number above 0, to 1000", lambda x: 0 < x <= 1000),
    "model.expand_v": ("a number above 0, to 1000", lambda x: 0 < x <= 1000),
    "model.ffn_ratio": ("a number above 0, to 1000", lambda x: 0 < x <= 1000),
    "model.ffn_multiple": ("a whole number from 1 to 1,048,576", lambda x: 1 <= x <= 2**20),
    "model.norm_eps": ("a number above 0, to 1", lambda x: 0 < x <= 1),
    "optim.lr": ("a number above 0", lambda x: 0 < x < math.inf),
    "optim.weight_decay": ("a number from 0", lambda x: 0 <= x < math.inf),
    "optim.warmup_steps": ("a whole number from 0 to 10^12", lambda x: 0 <= x <= MANY),
    "optim.beta1": ("a number from 0 to below 1", lambda x: 0 <= x < 1),
    "optim.beta2": ("a number from 0 to below 1", lambda x: 0 <= x < 1),
    "optim.min_lr_ratio": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "optim.grad_clip": ("a number from 0 (0: no clipping)", lambda x: 0 <= x < math.inf),
    "trainer.max_steps": ("a whole number from 1 to 10^12", lambda x: 1 <= x <= MANY),
    "trainer.val_every": ("a whole number from 1 to 10^12", lambda x: 1 <= x <= MANY),
    "trainer.max_time": ("a number above 0, or null", lambda x: x is None or x > 0),
    "trainer.accumulate": ("a whole number from 1", lambda x: x >= 1),
    "trainer.log_every": ("a whole number from 1 to 10^12", lambda x: 1 <= x <= MANY),
    "trainer.devices": ("a whole number from 1 to 1024", lambda x: 1 <= x <= 1024),
    "trainer.num_nodes": ("a whole number from 1 to 65,536", lambda x: 1 <= x <= 2**16),
}


@contextmanager
def located(where: object) -> Iterator[None]:
    """Puts `where` (a file, the command line) before the message of a `ConfigError` from inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def merge(values: Mapping[str, Any], layer: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`values` with `layer` laid over them; a key of `layer` may be dotted ("model.heads").

    Options belong to their choice: a gate or data source given as a mapping with a `name` replaces the present one
    whole, and `model.gate.name` alone drops the present one's options if it names another. The keys that every choice
    has (`CHOICES`) stay. The order of keys within a layer doesn't matter.
    """
    merged = dict(values)
    for key, value in sorted(layer.items(), key=_names_first):
        head, dot, rest = str(key).partition(".")
        here = f"{where}.{head}" if where else head
        if dot and not (head and rest):
            raise ConfigError(f"{where}{'.' * bool(where)}{key}: no such key: a dot stands between two names")
        old = merged.get(head)
        if rest:
            value = {rest: value}
        if isinstance(value, Mapping):
            old = old if isinstance(old, Mapping) else {}
            if here in CHOICES and "name" in value and not (rest and value["name"] == old.get("name")):
                old = {k: old[k] for k in CHOICES[here] if k in old}
            merged[head] = merge(old, value, here)
        elif isinstance(old, Mapping):
            example = f", such as {{name: {value}}}" if here in CHOICES and isinstance(value, str) else ""
            raise ConfigError(f"{here}: got {value!r}, takes a mapping{example}")
        else:
            merged[head] = value
    return merged


def _names_first(item: tuple[Any, Any]) -> tuple[int, bool]:
    """Sorts whole mappings before keys inside them, and names of choices before their options."""
    key = str(item[0])
    return key.count("."), not key.endswith("name")


@functools.cache
def type_hints(schema: Any) -> dict[str, Any]:
    """`typing.get_type_hints`, which compiles each annotation anew."""
    return typing.get_type_hints(schema)


def fill(schema: type[T], given: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `schema` with the values of `given`, each checked against its annotation; the rest by default.

    Raises `ConfigError` for a key that `schema` doesn't have, for a value of another type and for a missing value.
    """
    kinds = type_hints(typing.cast(Any, schema))
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in kinds:
            raise ConfigError(f"{where}{key}: no such key{nearest(str(key), kinds)} (valid: {', '.join(kinds)})")
        if dataclasses.is_dataclass(kinds[key]):
            inner = check_type(value, dict[str, Any], f"{where}{key}")
            values[key] = fill(typing.cast(type, kinds[key]), inner, f"{where}{key}.")
        else:
            values[key] = check_type(value, kinds[key], f"{where}{key}")
    for f in dataclasses.fields(typing.cast(Any, schema)):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{f.name}: missing")
    return schema(**values)


def resolve(values: Mapping[str, Any]) -> Config:
    """A trial's values, checked whole and completed: schema, bounds, the gate's options and the data source's.

    `values` hold no interpolations any more. Loads the plugins that they name. Raises `ConfigError` that begins with
    the dotted key.
    """
    from gla_ablate.data import check_data, check_lengths  # here, so that reading the schema alone doesn't import torch

    config = resolve_model(values)
    config.data = check_data(config.data)
    config.eval.lengths = check_lengths(config.data, config.eval.lengths)
    check_shares(config)
    return config


def resolve_model(values: Mapping[str, Any]) -> Config:
    """As `resolve`, but for `data`, which stays as given: weights can be used where the data aren't."""
    from gla_ablate.model import check_model, load_plugins

    config = fill(Config, values)
    for key, (takes, allows) in RULES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not allows(value):
            raise ConfigError(f"{key}: got {value}, takes {takes}")
    load_plugins(config.plugins)
    config.model = check_model(config.model)
    return config


def check_shares(config: Config) -> None:
    """That all devices get equally many rows of a batch, in equal micro-batches, and what only one device can do.
    Raises `ConfigError`."""
    rows, devices, parts = config.data["batch_size"], config.trainer.processes, config.trainer.accumulate
    if devices > 1 and config.trainer.precision == "bf16-true":
        raise ConfigError(
            "trainer.precision: got bf16-true, whose fp32 masters are on one device (trainer.devices, "
            "trainer.num_nodes); takes bf16-mixed on several, where trainer.strategy fsdp computes in bf16 weights"
        )
    if rows % devices:
        fitting = max(n for n in range(1, min(rows, devices) + 1) if rows % n == 0)
        raise ConfigError(
            f"data.batch_size: got {rows}, which {devices} devices (trainer.devices · trainer.num_nodes) can't share "
            f"equally; takes a multiple of {devices}, such as {-(-rows // devices) * devices}, or fewer devices, such "
            f"as {fitting}"
        )
    rows //= devices
    if rows % parts:
        fits = next(n for n in range(min(parts, rows), 0, -1) if rows % n == 0)
        rest = "the rows of a step" if devices == 1 else f"over {devices} devices, the rows of a step on each"
        raise ConfigError(
            f"trainer.accumulate: got {parts}, takes a divisor of data.batch_size, {rows}, {rest}: "
            f"such as {fits}, or data.batch_size {devices * parts * math.ceil(rows / parts)}"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """`config` as plain nested dicts: what `config.yaml` holds."""
    return dataclasses.asdict(config)


def without_unused(values: Mapping[str, Any]) -> dict[str, Any]:
    """`to_dict`'s values without a section that asks for nothing, which tells no two trials apart."""
    unused = {"eval": dataclasses.asdict(EvalConfig())}
    return {key: value for key, value in values.items() if key not in unused or value != unused[key]}


def read_config(path: Path) -> Config:
    """The resolved config in a trial's `config.yaml`."""
    values = read_yaml(path)
    with located(path):
        return resolve(values)


def write_config(config: Config, path: Path) -> None:
    replace(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).encode())
