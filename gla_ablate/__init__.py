"""Ablations of the gate in gated linear attention (Yang et al., 2023, arXiv 2312.06635)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gla_ablate.loading import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load`, imported with its first use: it needs torch, which takes seconds."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gla_ablate.loading import load

    return load
