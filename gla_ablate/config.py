"""The whole schema of a trial, as dataclasses. An experiment is this plus a grid (`experiment.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """The network. K = dim · expand_k / heads key channels and V = dim · expand_v / heads value channels a head."""

    dim: int = 128
    layers: int = 2
    heads: int = 2
    expand_k: float = 0.5
    expand_v: float = 1.0
    ffn_ratio: float = 8 / 3  # SwiGLU width / dim, before rounding up
    ffn_multiple: int = 32  # the SwiGLU width is rounded up to a multiple of this
    tie_embeddings: bool = False
    chunk_size: int = 64  # tokens a chunk of the op: changes speed, never the result beyond rounding
    backend: str = "auto"  # of the op: auto | triton | torch
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
    precision: str = "auto"  # auto: bf16-mixed where the device has it, else 32-true


@dataclass
class Config:
    """One trial, fully resolved: what `config.yaml` in its folder holds."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: dict[str, Any] = field(default_factory=lambda: {"name": "stdlib", "seq_len": 256, "batch_size": 8})
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0
    plugins: list[str] = field(default_factory=list)  # files that register gates, absolute
