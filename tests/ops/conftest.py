from collections.abc import Iterator

import pytest
import torch


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
