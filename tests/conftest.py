"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before they are first imported."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import patch_once_a_launch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_once_a_launch()
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # side by side they share the cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture
def scratch_registry() -> Iterator[None]:
    """Gates, sources and plugins that a test registers are gone after it."""
    from tests.registries import scratch_registries

    with scratch_registries():
        yield
