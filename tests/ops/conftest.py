from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gla_ablate.ops.kernels import call


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, so that whatever a kernel leaves unwritten, or reads unwritten, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def frugal() -> Iterator[None]:
    """Tests run side by side on one GPU, and PyTorch keeps what it once had."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The kernels that the test launches, by name, and with what."""
    seen: list[tuple[str, dict[str, Any]]] = []
    real = call.launch

    def look_on(kernel: Any, grid: int, key: Any = None, **arguments: Any) -> None:
        seen.append((kernel.fn.__name__, arguments))
        real(kernel, grid, key, **arguments)

    monkeypatch.setattr(call, "launch", look_on)
    return seen
