"""What `trainer.compile: auto` and `trainer.recompute: auto` stand for."""

from __future__ import annotations

import torch

from gla_ablate.config import Config
from gla_ablate.model import flops_per_token
from gla_ablate.model.recompute import Recompute

# On an H200 compiling takes 3 s (from caches) to 15 s and makes a step of the 340M model 1.3 times as fast (B16 T2048:
# 218 → 164 ms). A block costs the host 5 ms a step, compiled or not: a step with less than that to compute waits for
# the host, and a model of 2 layers, 128 wide, B8 T256, takes 10 ms either way.
FEWEST_FLOPS = 1.5e12  # of a layer and step, on one device
SHORTEST_TRIAL = 2.5e16  # floating-point operations of a device: two minutes


def resolve_compile(config: Config, vocab_size: int, device: torch.device) -> bool:
    """Whether a trial's blocks are compiled: as asked, and for "auto" on a GPU where that saves more than it takes."""
    asked = config.trainer.compile
    if asked != "auto":
        return asked
    seq_len, batch_size = config.data["seq_len"], config.data["batch_size"]
    step = flops_per_token(config.model, vocab_size, seq_len) * seq_len * batch_size / config.trainer.processes
    pays = step >= FEWEST_FLOPS * config.model.layers and step * config.trainer.max_steps >= SHORTEST_TRIAL
    return device.type == "cuda" and pays


def resolve_recompute(config: Config, compiled: bool) -> Recompute:
    """What blocks form anew: as asked, and for "auto" what costs nothing once it is compiled."""
    asked = config.trainer.recompute
    if asked != "auto":
        return asked
    return "elementwise" if compiled else "none"
