"""The rate that utilisation is measured against: none without a GPU, and nothing left behind on one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from gla_ablate import utilisation
from gla_ablate.utilisation import matrix_rate, peak_flops


def test_a_cpu_has_none():
    assert peak_flops("32-true", torch.device("cpu")) is None


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """What of torch.cuda `peak_flops` calls; the names of what it cleans up after itself."""
    done = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("peak"))
    return done


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)],
)
def test_the_product_is_in_the_precision_of_the_trial(precision, dtype, monkeypatch, as_if_on_a_gpu):
    monkeypatch.setattr(utilisation, "matrix_rate", lambda given: {dtype: 2e12}[given])
    assert peak_flops(precision, torch.device("cuda")) == 2e12
    assert as_if_on_a_gpu == ["cache", "peak"]


def test_a_gpu_without_room_has_none(monkeypatch, as_if_on_a_gpu):
    def full(dtype):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(utilisation, "matrix_rate", full)
    assert peak_flops("bf16-mixed", torch.device("cuda")) is None
    assert as_if_on_a_gpu == ["cache", "peak"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_a_gpu_multiplies_and_is_left_as_it_was():
    before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    rate = peak_flops("bf16-mixed", torch.device("cuda", 0))
    assert torch.equal(torch.cuda.get_rng_state(), before[0]) and torch.cuda.memory_allocated() == before[1]
    assert torch.cuda.max_memory_allocated() == before[1]
    assert rate and 1e12 < rate < 1e16 and matrix_rate(torch.bfloat16) == pytest.approx(rate, rel=0.2)
