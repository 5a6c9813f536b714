"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before they are first imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def scratch_registry() -> Iterator[None]:
    """Gates, sources and plugins that a test registers are gone after it."""
    from tests.registries import scratch_registries

    with scratch_registries():
        yield
