"""What the op takes and refuses: each refusal is a ValueError that names the argument, before anything is launched."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gla_ablate.ops import gated_linear_attention, resolve_backend
from gla_ablate.ops.reference import recurrent
from tests.ops.cases import DEVICE, GPU, KINDS, Case, inputs

B, T, H, K, V = 2, 10, 3, 8, 6


def arguments(**changes: Any) -> dict[str, Any]:
    given = {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "g": -torch.rand(B, T, H, K),
        **changes,
    }
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}


REFUSED = {
    "q three-dimensional": ({"q": torch.randn(B, T, K)}, "q: got shape"),
    "q of integers": ({"q": torch.ones(B, T, H, K, dtype=torch.long)}, "q: got dtype torch.int64"),
    "q a list": ({"q": [1.0]}, "q: got list"),
    "k of other heads": ({"k": torch.randn(B, T, H + 1, K)}, "k: got shape .* fewer heads that divide"),
    "k of heads that don't divide q's": ({"k": torch.randn(B, T, H - 1, K)}, "k: got shape .* fewer heads that divide"),
    "q without heads": ({"q": torch.randn(B, T, 0, K)}, "q: got shape .* at least one head"),
    "k without heads": ({"k": torch.randn(B, T, 0, K), "v": torch.randn(B, T, 0, V), "g": None}, "k: got shape"),
    "k of another width": ({"k": torch.randn(B, T, H, K + 1)}, "k: got shape"),
    "v of q's heads, k of fewer": ({"k": torch.randn(B, T, 1, K)}, r"v: got shape .* to go with k"),
    "g of q's heads, k of fewer": (
        {"k": torch.randn(B, T, 1, K), "v": torch.randn(B, T, 1, V)},
        r"g: got shape \[2, 10, 3, 8\], takes one of \[1\]",
    ),
    "state of q's heads, k of fewer": (
        {
            "k": torch.randn(B, T, 1, K),
            "v": torch.randn(B, T, 1, V),
            "g": None,
            "initial_state": torch.zeros(B, H, K, V),
        },
        r"initial_state: got shape .* takes \[2, 1, 8, 6\]",
    ),
    "v of another length": ({"v": torch.randn(B, T + 1, H, V)}, "v: got shape"),
    "v too wide": ({"v": torch.randn(B, T, H, 513)}, "v: got 513 channels"),
    "no channels": ({"q": torch.randn(B, T, H, 0), "k": torch.randn(B, T, H, 0)}, "q: got 0 channels"),
    "g of the batch's size": ({"g": torch.zeros(B)}, "g: got shape"),
    "g of value channels": ({"g": torch.zeros(B, T, H, V)}, "g: got shape"),
    "q sparse": ({"q": torch.randn(B, T, H, K).to_sparse()}, "q: got a nested tensor or layout torch.sparse_coo"),
    "q of other channels than k, none": ({"q": torch.randn(B, T, H, 0)}, "q: got 0 channels"),
    "a scale that no float holds": ({"scale": 10**400}, "scale: got 1000"),
    "g of integers": ({"g": torch.zeros(H, dtype=torch.int32)}, "g: got dtype"),
    "state of another shape": ({"initial_state": torch.zeros(B, H, V, K)}, "initial_state: got shape"),
    "state in bf16": ({"initial_state": torch.zeros(B, H, K, V, dtype=torch.bfloat16)}, "initial_state: got dtype"),
    "cu_seqlens with a batch": ({"cu_seqlens": torch.tensor([0, T])}, "cu_seqlens: got a batch of 2"),
    "cu_seqlens of floats": ({"cu_seqlens": torch.tensor([0.0, T])}, "cu_seqlens: got torch.float32"),
    "chunk size 48": ({"chunk_size": 48}, "chunk_size: got 48"),
    "chunk size 8": ({"chunk_size": 8}, "chunk_size: got 8"),
    "chunk size 512": ({"chunk_size": 512}, "chunk_size: got 512"),
    "chunk size of a bool": ({"chunk_size": True}, "chunk_size: got True"),
    "chunk size of a word": ({"chunk_size": "large"}, "chunk_size: got 'large'"),
    "chunk size of a float": ({"chunk_size": 64.0}, "chunk_size: got 64.0"),
    "chunk sizes": ({"chunk_size": torch.tensor([16, 32])}, r"chunk_size: got tensor\(\[16, 32\]"),
    "scale of a word": ({"scale": "a"}, "scale: got 'a', takes a finite number"),
    "scale that would learn": ({"scale": torch.ones((), requires_grad=True)}, "scale: got Tensor"),
    "scale of NaN": ({"scale": float("nan")}, "scale: got nan"),
    "unknown backend": ({"backend": "cuda"}, "backend: got 'cuda'"),
    "fp64 on triton": (
        {name: torch.zeros(B, T, H, n).double() for name, n in (("q", K), ("k", K), ("v", V))} | {"backend": "triton"},
        "backend: got 'triton' with float64",
    ),
    "gate above 0": ({"g": torch.full((H,), 0.5), "check_inputs": True}, r"g: got 0.5 at index \[0\]"),
    "NaN gate": ({"g": torch.full((B, T, H), torch.nan), "check_inputs": True}, "g: got nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**arguments(**changes))


@pytest.mark.parametrize("ends", [[0, 4], [1, T], [0, 7, 5, T]])
def test_check_inputs_finds_offsets_that_do_not_rise_to_the_end(ends: list[int]) -> None:
    given = {name: x[:1] for name, x in arguments().items()}
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        gated_linear_attention(**given, cu_seqlens=torch.tensor(ends, device=DEVICE), check_inputs=True)


def test_auto_is_triton_on_cuda_and_torch_elsewhere() -> None:
    assert resolve_backend("auto", "cuda") == "triton"
    assert resolve_backend("auto", "cuda", torch.float64) == "torch"
    assert resolve_backend("auto", "cpu") == "torch"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_sequence_passes_the_state_on(kind: str, backend: str) -> None:
    given, _ = inputs(Case(kind=kind, T=0))
    q, k, v, g, start = (None if given[n] is None else given[n].float() for n in ("q", "k", "v", "g", "initial_state"))
    start.requires_grad_()
    o, state = gated_linear_attention(q, k, v, g, initial_state=start, output_final_state=True, backend=backend)
    assert o.shape == v.shape
    assert torch.equal(state, start)
    (grad,) = torch.autograd.grad(state.sum(), start)
    assert torch.equal(grad, torch.ones_like(start))
    _, zero = gated_linear_attention(q, k, v, g, output_final_state=True, backend=backend)
    assert torch.equal(zero, torch.zeros_like(start))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_non_contiguous_inputs_are_right(backend: str) -> None:
    given, _ = inputs(Case(T=33))

    def strided(x: Tensor) -> Tensor:  # the same values with the heads outermost and a gap between the channels
        wide = x.float().movedim(2, 0).repeat_interleave(2, -1).contiguous()
        return wide[..., ::2].movedim(0, 2)

    args = [given[name] for name in ("q", "k", "v", "g")]
    views = [strided(x).requires_grad_() for x in args]
    assert not any(x.is_contiguous() for x in views)
    o, _ = gated_linear_attention(*views, backend=backend)
    incoming = strided(inputs(Case(T=33))[1]["o"])
    grads = torch.autograd.grad(o, views, incoming)
    leaves = [x.clone().requires_grad_() for x in args]
    want, _ = recurrent(*leaves, scale=Case().K ** -0.5)
    torch.testing.assert_close(o.double(), want, rtol=0, atol=1e-4)
    for got, ref in zip(grads, torch.autograd.grad(want, leaves, incoming.double()), strict=True):
        torch.testing.assert_close(got.double(), ref, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gate_of_minus_infinity_resets(backend: str) -> None:
    given, _ = inputs(Case(T=40))
    q, k, v, g = (given[name].float() for name in ("q", "k", "v", "g"))
    g = g.clone()
    g[:, 20] = -torch.inf
    g.requires_grad_()
    o, _ = gated_linear_attention(q, k, v, g, backend=backend, chunk_size=16)
    (dg,) = torch.autograd.grad(o.sum(), g)
    alone, _ = gated_linear_attention(q[:, 20:], k[:, 20:], v[:, 20:], g[:, 20:].detach(), backend=backend)
    torch.testing.assert_close(o[:, 20:], alone, rtol=1e-5, atol=1e-5)
    assert dg.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_a_gate_of_nan_shows_in_the_output(kind: str, backend: str) -> None:
    given, _ = inputs(Case(kind=kind, T=40))
    q, k, v, g = (given[name].float() for name in ("q", "k", "v", "g"))
    g = g.clone()
    g.view(-1)[0 if kind == "head" else g[:, :20].numel()] = torch.nan
    o, _ = gated_linear_attention(q, k, v, g, backend=backend, chunk_size=16)
    assert o.isnan().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_offsets_of_packed_sequences_may_be_strided(backend: str) -> None:
    given = {name: x.float() for name, x in arguments().items()}
    given = {name: x[:1] for name, x in given.items()}
    ends = torch.tensor([[0, 5], [7, 5], [given["q"].shape[1], 5]], device=DEVICE)[:, 0]
    assert not ends.is_contiguous()
    o, _ = gated_linear_attention(**given, cu_seqlens=ends, backend=backend)
    want, _ = gated_linear_attention(**given, cu_seqlens=ends.clone(), backend="torch")
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_negated_view_is_read_as_what_it_is(backend: str) -> None:
    given = {name: x.float() for name, x in arguments().items()}
    v = torch._neg_view(given["v"]).requires_grad_()
    o, _ = gated_linear_attention(**given | {"v": v}, backend=backend)
    want, _ = gated_linear_attention(**given, backend="torch")
    torch.testing.assert_close(o, -want, rtol=1e-4, atol=1e-5)
    (dv,) = torch.autograd.grad(o, v, torch._neg_view(torch.ones_like(o)))
    again, _ = gated_linear_attention(**given | {"v": v}, backend=backend)
    (plain,) = torch.autograd.grad(again.sum(), v)
    torch.testing.assert_close(dv, -plain)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_tokens_give_is_of_the_graph_and_nobody_else_s(kind: str, backend: str) -> None:
    given, _ = inputs(Case(kind=kind, T=0, group=2))
    start = given["initial_state"].float()
    wanted = [given[n].float().requires_grad_() for n in ("q", "k", "v", "g") if given[n] is not None]
    q, k, v, g = (*wanted, None)[:4]
    o, state = gated_linear_attention(q, k, v, g, initial_state=start, output_final_state=True, backend=backend)
    assert torch.equal(state, start) and state.data_ptr() != start.data_ptr()
    assert o.shape == (*q.shape[:3], v.shape[3])
    for grad, x in zip(torch.autograd.grad(o, wanted, torch.zeros_like(o)), wanted, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("strength", ["usual", "strong"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_sequence(kind: str, strength: str, broken: int) -> None:
    """Sequences end inside a tile of memory, and what the copy engine brings in holds rows of both."""
    given, _ = inputs(Case(kind=kind, strength=strength, T=60, K=256 if GPU else 48, V=16, H=1))
    q, k, v, g = (None if x is None else x.float() for x in (given[name] for name in "qkvg"))
    do = torch.ones_like(v)
    ends = torch.tensor([0, 40, 60], device=DEVICE)
    dirty, clean = ((slice(0, 40), slice(40, 60)), (slice(40, 60), slice(0, 40)))[broken]
    for x in (q, k, v, g, do):
        if x is not None and x.dim() > 1:
            x[:, dirty] = torch.nan
    wanted = [x.requires_grad_() for x in (q, k, v, g) if x is not None]
    o, _ = gated_linear_attention(q, k, v, g, cu_seqlens=ends, backend="triton")
    grads = torch.autograd.grad(o, wanted, do)
    assert o[:, dirty].isnan().any()
    assert all(x[:, clean].isfinite().all() for x in (o, *grads) if x.dim() > 1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scale_multiplies_the_output(backend: str) -> None:
    given = {name: x.float() for name, x in arguments().items()}
    one, _ = gated_linear_attention(**given, scale=1.0, backend=backend)
    half, _ = gated_linear_attention(**given, scale=0.5, backend=backend)
    default, _ = gated_linear_attention(**given, backend=backend)
    torch.testing.assert_close(half, one / 2)
    torch.testing.assert_close(default, one * K**-0.5)


def test_mixed_dtypes_are_promoted_and_their_gradients_come_back_in_their_own() -> None:
    given = arguments()
    q = given["q"].bfloat16().requires_grad_()
    v = given["v"].requires_grad_()
    g = given["g"].bfloat16().requires_grad_()
    o, _ = gated_linear_attention(q, given["k"].bfloat16(), v, g, backend="torch")
    assert o.dtype == torch.float32
    dq, dv, dg = torch.autograd.grad(o.sum(), (q, v, g))
    assert (dq.dtype, dv.dtype, dg.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast_sets_the_dtype_as_for_a_matrix_product(backend: str) -> None:
    given = arguments()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        o, _ = gated_linear_attention(**given | {"q": given["q"].bfloat16()}, backend=backend)
    assert o.dtype == torch.bfloat16
    full, _ = gated_linear_attention(**given, backend="torch")
    assert (o.float() - full).norm() <= 1e-2 * full.norm()


OFFSETS = {"short": [0, 4], "long": [0, T + 4], "falling": [0, 6, 4, T], "from 1 on": [1, T]}


@pytest.mark.parametrize("ends", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_offsets_are_looked_at_where_that_costs_nothing(backend: str, ends: list[int]) -> None:
    given = {name: x[:1] for name, x in arguments().items()}
    free = backend == "torch" or not GPU  # on a GPU the kernels would have to be waited for
    with pytest.raises(ValueError, match=f"takes offsets that rise from 0 to T = {T}"):
        gated_linear_attention(
            **given, cu_seqlens=torch.tensor(ends, device=DEVICE), backend=backend, check_inputs=not free
        )


@pytest.mark.skipif(GPU, reason="there it is right")
def test_bfloat16_is_refused_by_the_interpreter_whose_products_are_wrong() -> None:
    given = {name: x.bfloat16() for name, x in arguments().items()}
    with pytest.raises(ValueError, match="backend: got 'triton' with bfloat16 in Triton's interpreter"):
        gated_linear_attention(**given, backend="triton")


def test_a_device_that_has_no_autocast_will_do() -> None:
    given = {name: x.to("meta") for name, x in arguments().items()}
    o, state = gated_linear_attention(**given, output_final_state=True, backend="torch")
    assert o.shape == (B, T, H, V) and state is not None and state.shape == (B, H, K, V)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), True, "1"], ids=str)
def test_a_scale_that_is_no_number_is_refused_while_tracing_too(scale: Any) -> None:
    given = arguments()
    compiled = torch.compile(
        lambda scale: gated_linear_attention(**given, scale=scale, backend="torch")[0], fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"scale: got .*, takes a finite number"):  # of Dynamo's, or a ValueError
        compiled(scale)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_large_numbers_stay_finite_under_strong_gates_on_the_torch_backend(side: str) -> None:
    """Inside a block the decay to a row that nobody reads would have made them infinite."""
    one = torch.ones(1, 16, 1, 1, dtype=torch.float32, device=DEVICE)
    large, gate = 1e6 * one, (-20 * one).requires_grad_()
    leaves = [x.clone().requires_grad_() for x in (one, *((large, one) if side == "keys" else (one, large)))]
    gates = {"g": gate} if side == "keys" else {"gv": gate}
    o, _ = gated_linear_attention(*leaves, **gates, backend="torch")
    torch.testing.assert_close(o, large)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), (*leaves, gate)))
