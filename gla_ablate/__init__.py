"""Ablations of the gate in gated linear attention (Yang et al., 2023, arXiv 2312.06635)."""

__version__ = "0.1.0"
