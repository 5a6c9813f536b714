"""The op among PyTorch's own: gradcheck, opcheck, torch.compile, second derivatives."""

from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gla_ablate.ops import gated_linear_attention
from tests.ops.cases import DEVICE, GPU, KINDS, Case, leaves


def arguments(kind: str, dtype: torch.dtype, T: int = 20, group: int = 1, K: int = 4) -> tuple[Tensor | None, ...]:
    given = leaves(Case(kind=kind, T=T, H=1, K=K, V=3, chunk=16, group=group), dtype)
    return tuple(given[name] for name in ("q", "k", "v", "g", "initial_state"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_passes_in_fp64_on_the_torch_backend(kind: str) -> None:
    def op(q: Tensor, k: Tensor, v: Tensor, start: Tensor, g: Tensor | None = None) -> Any:
        return gated_linear_attention(
            q, k, v, g, initial_state=start, output_final_state=True, chunk_size=16, backend="torch"
        )

    q, k, v, g, start = arguments(kind, torch.float64)
    assert torch.autograd.gradcheck(op, (q, k, v, start, *(() if g is None else (g,))), fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "group", "K", "chunk"),
    [
        *((kind, 1, 4, 16) for kind in KINDS),
        ("channel", 2, 4, 16),
        *((kind, 2, 33, 32) for kind in ("none", "head", "token")),  # whose kernels for narrow heads keep other tensors
    ],
)
def test_opcheck_passes(kind: str, group: int, K: int, chunk: int) -> None:
    from gla_ablate.ops import library

    q, k, v, g, start = arguments(kind, torch.float32, group=group, K=K)
    torch.library.opcheck(library.forward, (q, k, v, g, start, None, 0.5, chunk, True, True))
    plain = [None if x is None else x.detach() for x in (q, k, v, g, start)]
    for save, learned in ((True, True), (False, True), (True, False)) if group == 1 else ((True, True),):
        o, state, *kept = library.forward(*plain, None, 0.5, chunk, True, save)
        given = (*plain, None, *kept, torch.randn_like(o), torch.randn_like(state), 0.5, chunk)
        torch.library.opcheck(library.backward, (*given, learned))
    if group > 1:
        return
    packed = torch.tensor([0, 3, 20], device=DEVICE)  # whose tiles fill the tables to the end
    torch.library.opcheck(library.forward, (q, k, v, g, None, packed, 0.5, chunk, False, True))
    q, k, v, g, _ = plain
    o, _, *kept = library.forward(q, k, v, g, None, packed, 0.5, chunk, False, True)
    given = (q, k, v, g, None, packed, *kept, torch.randn_like(o), None, 0.5, chunk, True)
    torch.library.opcheck(library.backward, given)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind: str, backend: str) -> None:
    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        return gated_linear_attention(q * 2, k, v, g, chunk_size=16, backend=backend)[0].sin()

    q, k, v, g, _ = arguments(kind, torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    wanted = [x for x in (q, k, v, g) if x is not None]
    for got, want in zip(
        torch.autograd.grad(compiled(q, k, v, g).sum(), wanted),
        torch.autograd.grad(op(q, k, v, g).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "packed"), [("channel", False), ("channel", True), ("none", True)])
def test_a_new_length_recompiles_at_most_once(kind: str, packed: bool) -> None:
    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, ends: Tensor | None) -> Tensor:
        return gated_linear_attention(q, k, v, g, cu_seqlens=ends, chunk_size=16, backend="triton")[0]

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    for n, T in enumerate((20, 33, 47, 70), start=2):
        q, k, v, g, _ = arguments(kind, torch.float32, T)
        ends = torch.tensor([*range(n), T], device=DEVICE) if packed else None
        wanted = [x for x in (q, k, v, g) if x is not None]
        found = torch.autograd.grad(compiled(q, k, v, g, ends).sum(), wanted)
        for got, want in zip(found, torch.autograd.grad(op(q, k, v, g, ends).sum(), wanted), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_a_scale_that_changes_from_call_to_call_compiles() -> None:
    def op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return gated_linear_attention(q, k, v, None, scale=scale, chunk_size=16, backend="torch")[0]

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    q, k, v, _, _ = arguments("none", torch.float32)
    for scale in (0.5, 0.7, 0.9):
        torch.testing.assert_close(compiled(q, k, v, scale), op(q, k, v, scale), rtol=1e-4, atol=1e-5)


def test_modes_that_look_on_see_the_operator() -> None:
    class LookOn(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    q, k, v, g, _ = arguments("channel", torch.float32)
    with LookOn():
        gated_linear_attention(q, k, v, g, backend="triton")
    assert "gla_ablate.forward.default" in seen


def test_a_batch_of_calls_goes_through_vmap() -> None:
    q, k, v, g, _ = (None if x is None else x.detach() for x in arguments("token", torch.float32))

    def op(*given: Tensor) -> Tensor:
        return gated_linear_attention(*given, backend="triton")[0]

    got = torch.vmap(op)(*(torch.stack((x, x * 0.5)) for x in (q, k, v, g)))
    torch.testing.assert_close(got[1], op(*(x * 0.5 for x in (q, k, v, g))))


def test_compiled_autograd_takes_the_backward() -> None:
    q, k, v, g, _ = arguments("channel", torch.float32)
    wanted = (q, k, v, g)
    want = torch.autograd.grad(gated_linear_attention(*wanted, backend="triton")[0].sum(), wanted)
    loss = gated_linear_attention(*wanted, backend="triton")[0].sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    for x, y in zip(wanted, want, strict=True):
        torch.testing.assert_close(x.grad, y)


def test_a_second_derivative_raises_clearly() -> None:
    q, k, v, g, _ = arguments("token", torch.float32)
    o, _ = gated_linear_attention(q, k, v, g, backend="triton")
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dq.sum(), q)


def test_same_input_gives_the_same_bits() -> None:
    q, k, v, g, start = arguments("channel", torch.float32, 70)

    def run() -> list[Tensor]:
        o, state = gated_linear_attention(q, k, v, g, initial_state=start, output_final_state=True, backend="triton")
        return [o, state, *torch.autograd.grad(o.sum() + state.sum(), (q, k, v, g, start))]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
