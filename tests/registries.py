"""Registries that tests may add to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gla_ablate.data.source import DATA
from gla_ablate.model import GATES, plugins


@contextmanager
def scratch_registries() -> Iterator[pytest.MonkeyPatch]:
    """What registers inside, plugins too, is gone after it; as is what is patched with the result."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (GATES, DATA):
            patch.setattr(registry, "_classes", dict(registry._classes))
        patch.setattr(plugins, "_sha256", {})
        yield patch
