"""Registries that tests may add to, and what to take of them where all would be many times the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gla_ablate.data.source import DATA
from gla_ablate.model import GATES, Gate, plugins


@contextmanager
def scratch_registries() -> Iterator[pytest.MonkeyPatch]:
    """What registers inside, plugins too, is gone after it; as is what is patched with the result."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (GATES, DATA):
            patch.setattr(registry, "_classes", dict(registry._classes))
        patch.setattr(plugins, "_sha256", {})
        yield patch


def built_in_gates() -> list[str]:
    """The gates of this package, whatever plugins are loaded."""
    return [name for name in GATES.names() if GATES[name].__module__.startswith("gla_ablate.")]


def one_of_each_kind() -> list[str]:
    """Of the gates of this package, the first of each kind: of those with one shape of decay that do, or don't, rewrite
    k and v, make k, and share parameters between layers. For tests of what lies around a gate, which sees no more."""
    first: dict[tuple, str] = {}
    for name in built_in_gates():
        gate = GATES[name]
        rewrites = gate.transform is not Gate.transform
        shares = gate.build_shared.__func__ is not Gate.build_shared.__func__
        first.setdefault((gate.decay_shape, rewrites, gate.own_keys, shares), name)
    return list(first.values())
