"""Gated linear attention: the public op and the reference forms of the paper. Imports nothing of the package."""

from gla_ablate.ops.op import gated_linear_attention, resolve_backend

__all__ = ["gated_linear_attention", "resolve_backend"]
