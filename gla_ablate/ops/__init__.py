"""Gated linear attention: the public op and the reference forms of the paper. Imports nothing of the package."""

from gla_ablate.ops.op import gated_linear_attention, resolve_backend
from gla_ablate.ops.step import gated_linear_attention_step

__all__ = ["gated_linear_attention", "gated_linear_attention_step", "resolve_backend"]
