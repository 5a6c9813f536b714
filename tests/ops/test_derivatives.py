"""Derivatives that the kernels don't have are refused, not taken for zero; several gradients may come in at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gla_ablate.ops import gated_linear_attention, gated_linear_attention_step
from gla_ablate.ops.cross_entropy import linear_cross_entropy
from tests.ops.cases import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of vmap's way over an operator
B, T, H, K = 1, 5, 1, 4
NAMES = ("plain", "with a gate on values", "step")
Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def function(name: str, backend: str) -> Function:
    """Of q."""
    torch.manual_seed(1)
    k, v, g, gv = drawn(B, T, H, K), drawn(B, T, H, K), -drawn(B, T, H, K).abs(), -drawn(B, T, H, K).abs()
    if name == "step":
        first = [x[:, 0] for x in (k, v, g)]

        def step(q: Tensor) -> Tensor:
            state = torch.ones(B, H, K, K, device=DEVICE)
            return gated_linear_attention_step(q[:, 0], *first, state, backend=backend)

        return step
    side = None if name == "plain" else gv
    return lambda q: gated_linear_attention(q, k, v, g, gv=side, backend=backend)[0]


def pushed(f: Function, q: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, torch.ones_like(q)))).tangent


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_mode_derivative_is_refused_by_the_kernels_alone(name: str) -> None:
    q, ones = drawn(B, T, H, K), torch.ones(B, T, H, K, device=DEVICE)
    kernels, plain = function(name, "triton"), function(name, "torch")
    for derive in (lambda f: torch.func.jvp(f, (q,), (ones,)), lambda f: pushed(f, q)):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative here; backend='torch' does"):
            derive(kernels)
    if name != "step":  # which has no derivative at all
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            pushed(kernels, q.clone().requires_grad_())
        batch = torch.stack((q, q))
        for nested in (
            lambda: torch.func.jvp(torch.func.vmap(kernels), (batch,), (batch,)),
            lambda: torch.func.vmap(lambda q: torch.func.jvp(kernels, (q,), (ones,)))(batch),
        ):
            with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
                nested()
    # o is linear in q
    torch.testing.assert_close(torch.func.jvp(plain, (q,), (ones,))[1], plain(ones))
    with forward_ad.dual_level():  # of something else
        forward_ad.make_dual(q.clone(), ones)
        torch.testing.assert_close(kernels(q), plain(q))
        if name != "step":  # for which vmap has no rule
            torch.testing.assert_close(torch.func.vmap(kernels)(q[None]), plain(q)[None])


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_derivative_by_a_function_transform_is_refused_by_the_kernels_alone(name: str) -> None:
    q = drawn(B, T, H, K)
    kernels, plain = function(name, "triton"), function(name, "torch")
    pair = torch.stack((q, 2 * q))
    for derive in (
        lambda f: torch.func.grad(lambda q: f(q).sum())(q),
        lambda f: torch.func.vmap(torch.func.grad(lambda q: f(q).sum()))(pair),
        lambda f: torch.func.grad(lambda pair: torch.func.vmap(f)(pair).sum())(pair),
    ):
        with pytest.raises(RuntimeError, match=r"has no derivative of torch.func's here; torch.autograd's does, or "):
            derive(kernels)
        assert derive(plain).isfinite().all()
    one = torch.ones((), device=DEVICE)
    by_another = torch.func.grad(lambda factor: (factor * kernels(q)).sum())(one)
    torch.testing.assert_close(by_another, plain(q).sum())

    def of_a_constant(q: Tensor) -> Tensor:
        with torch.no_grad():
            o = kernels(q)
        return (q * o).sum()

    torch.testing.assert_close(torch.func.grad(of_a_constant)(q), plain(q))


@pytest.mark.parametrize("name", NAMES[:2])
def test_several_gradients_come_in_at_once(name: str) -> None:
    q = drawn(B, T, H, K).requires_grad_()
    f = function(name, "triton")
    o = f(q)
    incoming = drawn(3, *o.shape)

    def back(do: Tensor) -> Tensor:
        return torch.autograd.grad(o, q, do, retain_graph=True)[0]

    want = torch.stack([back(do) for do in incoming])
    at_once = torch.autograd.grad(o, q, incoming, retain_graph=True, is_grads_batched=True)[0]
    for got in (at_once, torch.func.vmap(back)(incoming)):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(f, q, vectorize=True), torch.autograd.functional.jacobian(f, q)
    )


def test_the_loss_in_chunks_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = drawn(6, 4), drawn(8, 4), torch.arange(6, device=DEVICE)

    def f(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, backend="torch")

    whole = torch.func.jvp(f, (hidden,), (hidden,))[1]
    assert whole.abs() > 0.1
    monkeypatch.setattr("gla_ablate.ops.cross_entropy.AT_ONCE", {"torch": 16, "triton": 16})
    with pytest.raises(
        RuntimeError, match=r"chunks has no forward-mode derivative here; F.cross_entropy of F.linear does"
    ):
        torch.func.jvp(f, (hidden,), (hidden,))
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy in chunks has no derivative of torch.func's"):
        torch.func.grad(f)(hidden)
    torch.testing.assert_close(f(hidden), linear_cross_entropy(hidden.double(), weight.double(), targets).float())
