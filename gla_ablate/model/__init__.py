"""The network: language model ← block ← mixer ← (gate, op). Importing it needs torch, nothing heavier."""

import gla_ablate.model.gate_family  # noqa: F401  # registers the gates
from gla_ablate.model.counting import count_parameters, counter, flops_per_token, state_size
from gla_ablate.model.gates import DECAY_SHAPES, GATES, Gate, GateShape, register_gate
from gla_ablate.model.language_model import LanguageModel, build_model
from gla_ablate.model.plugins import load_plugins, plugin_sha256
from gla_ablate.model.shapes import check_model

__all__ = [
    "DECAY_SHAPES",
    "GATES",
    "Gate",
    "GateShape",
    "LanguageModel",
    "build_model",
    "check_model",
    "count_parameters",
    "counter",
    "flops_per_token",
    "load_plugins",
    "plugin_sha256",
    "register_gate",
    "state_size",
]
