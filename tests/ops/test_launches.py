"""Which kernels a call launches, and with what: every launch passes `driver.launch`, where these tests look on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gla_ablate.ops import gated_linear_attention
from gla_ablate.ops.kernels import driver
from tests.ops.cases import GPU, KINDS, Case, leaves

CASE = Case(B=1, T=40, H=2, K=24, V=48, chunk=16)
KERNELS = {"scan_kernel", "scores_kernel", "output_kernel", "products_kernel", "gradient_kernel"}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    seen: list[tuple[str, dict[str, Any]]] = []
    real = driver.launch

    def look_on(kernel: Any, grid: int, **arguments: Any) -> None:
        seen.append((kernel.fn.__name__, arguments))
        real(kernel, grid, **arguments)

    monkeypatch.setattr(driver, "launch", look_on)
    return seen


def call(kind: str, backend: str) -> None:
    given = leaves(Case(**{**vars(CASE), "kind": kind}), torch.float32)
    q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
    o, _ = gated_linear_attention(q, k, v, g, chunk_size=CASE.chunk, backend=backend)
    o.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_triton_backend_which_auto_is_on_cuda_launches_the_kernels(
    kind: str, launches: list[tuple[str, dict[str, Any]]]
) -> None:
    call(kind, "auto" if GPU else "triton")
    assert {name for name, _ in launches} == KERNELS | ({"prepare_kernel"} if kind == "channel" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_backend_launches_none(kind: str, launches: list[tuple[str, dict[str, Any]]]) -> None:
    call(kind, "torch")
    assert launches == []


@pytest.mark.parametrize("kind", ["none", "head", "token"])
def test_a_gate_without_channels_is_never_widened(kind: str, launches: list[tuple[str, dict[str, Any]]]) -> None:
    """In no launch is there decay of K channels: not as g, not as sums of it, not as dg, not as q or k times decay."""
    given = leaves(Case(**{**vars(CASE), "kind": kind}), torch.float32)
    q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
    o, _ = gated_linear_attention(q, k, v, g, chunk_size=CASE.chunk, backend="triton")
    o.sum().backward()
    B, T, H, K = CASE.B, CASE.T, CASE.H, CASE.K
    inputs = {x.data_ptr() for x in (q, k)}
    for name, arguments in launches:
        assert arguments.get("total") is None
        if isinstance(arguments.get("dg"), Tensor):
            assert arguments["dg"].numel() <= B * T * H * -(-K // 16)
        if isinstance(arguments.get("g"), Tensor):
            assert arguments["g"].shape == g.shape
        for name_of_copy in ("qg", "kg"):
            copy = arguments.get(name_of_copy)
            if copy is not None and copy.shape[-1] == K:
                assert copy.data_ptr() in inputs, f"{name} reads a widened copy as {name_of_copy}"


def test_the_largest_buffer_of_a_scalar_gate_is_no_larger_than_without_a_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    real = driver.Call.new

    def new(self: driver.Call, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        out = real(self, *shape, dtype=dtype)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(driver.Call, "new", new)
    total = {}
    for kind in KINDS:
        sizes.clear()
        call(kind, "triton")
        total[kind] = sum(sizes)
    B, T, H, K = CASE.B, CASE.T, CASE.H, CASE.K
    per_row = B * T * H * 4
    flow = B * -(-T // CASE.chunk) * H * K * 4
    assert total["token"] - total["none"] <= per_row * -(-K // 16) + flow
    assert total["head"] - total["none"] <= per_row * -(-K // 16) + flow
    assert total["channel"] - total["none"] > per_row * K
