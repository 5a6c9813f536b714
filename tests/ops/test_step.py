"""A step for decoding: token by token it gives what the op gives for the sequence, and updates the state in place.

Without a GPU the kernel runs in the interpreter: small, and in fp32, since its 16-bit arithmetic isn't the hardware's.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gla_ablate.ops import gated_linear_attention, gated_linear_attention_step
from gla_ablate.ops.kernels import step as kernels
from gla_ablate.ops.reference import recurrent
from tests.ops.cases import DEVICE, GPU, KINDS, STRENGTHS, TOLERANCE, Case, inputs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32,)
SIZE = Case(B=3, T=12, H=4, K=128, V=256) if GPU else Case(B=2, T=6)

GATES = [
    replace(SIZE, kind=kind, strength=strength)
    for kind in KINDS
    for strength in (STRENGTHS if kind != "none" else ("usual",))
]
SHAPES = [
    replace(Case(kind=kind, B=2, T=3), K=K, V=V, H=H)
    for kind in KINDS
    for K, V, H in (
        ((1, 1, 3), (7, 33, 1), (80, 3, 2), (16, 130, 1), (65, 64, 3), (129, 131, 2), (256, 512, 4), (257, 100, 1),
         (512, 512, 2), (511, 511, 1), (512, 1, 1), (1, 512, 1))
        if GPU
        else ((1, 1, 3), (7, 33, 1), (80, 3, 2), (257, 20, 1), (512, 17, 1), (3, 512, 1))
    )
]  # fmt: skip
GROUPED = [replace(Case(kind=kind, B=2, T=3, group=4), K=K, V=V) for kind in KINDS for K, V in ((24, 20), (80, 3))]
LARGE = [replace(Case(kind=kind, B=16, T=4, H=8, K=256, V=512)) for kind in KINDS] if GPU else []


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """(grid, arguments) of every launch of the step's kernel."""
    seen: list[tuple[int, dict[str, Any]]] = []
    real = kernels.launch

    def look_on(kernel: Any, grid: int, **arguments: Any) -> None:
        assert kernel is kernels.step_kernel
        seen.append((grid, arguments))
        real(kernel, grid, **arguments)

    monkeypatch.setattr(kernels, "launch", look_on)
    yield seen


def sequence(case: Case, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """q, k, v `[B, T, H, ·]`, g and the state they start from; gate and state at least fp32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given, _ = inputs(case)
    names = ("q", "k", "v", "g", "initial_state")
    return tuple(
        x if x is None else x.to(wide if name in ("g", "initial_state") else dtype)
        for name, x in ((name, given[name]) for name in names)
    )


def token(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, ...]:
    """q, k, v `[B, H, ·]`, g and a state of the test's own, for one step."""
    q, k, v, g, start = sequence(replace(case, T=1), dtype)
    return q[:, 0], k[:, 0], v[:, 0], g if g is None or g.dim() == 1 else g[:, 0], start.clone()


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Steps through the sequence, each token a view into it, against the op in fp64."""
    q, k, v, g, start = sequence(case, torch.float64)
    want, want_state = gated_linear_attention(
        q, k, v, g, initial_state=start, output_final_state=True, chunk_size=16, backend="torch"
    )
    q, k, v, g, start = sequence(case, dtype)
    state, outputs = start.clone(), []
    for t in range(case.T):
        gate = g if g is None or g.dim() == 1 else g[:, t]
        outputs.append(gated_linear_attention_step(q[:, t], k[:, t], v[:, t], gate, state, backend=backend))
    o = torch.stack(outputs, 1)
    assert o.dtype == dtype and o.isfinite().all() and state.isfinite().all()
    limit = 1e-12 if dtype == torch.float64 else TOLERANCE[dtype][0]
    assert (o.double() - want).norm() <= limit * want.norm()
    # the state is fp32 whatever the inputs' dtype, and these inputs are exact in every dtype
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert (state.double() - want_state).norm() <= limit * want_state.norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "backend, dtype", [("torch", torch.float64), *((backend, dtype) for backend in BACKENDS for dtype in DTYPES)]
)
@pytest.mark.parametrize("case", GATES + SHAPES + GROUPED + LARGE, ids=lambda case: case.id)
def test_steps_give_what_the_op_gives_for_the_sequence(case: Case, backend: str, dtype: torch.dtype) -> None:
    check(case, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_updated_in_place_and_says_so(kind: str, backend: str) -> None:
    q, k, v, g, state = token(Case(kind=kind, B=2))
    before, where, version = state.clone(), state.data_ptr(), state._version
    o = gated_linear_attention_step(q, k, v, g, state=state, scale=1.0, backend=backend)
    assert state.data_ptr() == where
    assert state._version > version  # so that a backward that kept the state refuses to use it
    gate = g if g is None or g.dim() == 1 else g[:, None]
    want, want_state = recurrent(q[:, None], k[:, None], v[:, None], gate, scale=1.0, initial_state=before)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o, want[:, 0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_a_gate_of_minus_infinity_forgets(kind: str, backend: str) -> None:
    q, k, v, g, state = token(Case(kind=kind, B=2))
    gated_linear_attention_step(q, k, v, torch.full_like(g, -torch.inf), state, backend=backend)
    assert torch.equal(state, k[..., :, None] * v[..., None, :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_a_gate_of_nan_shows_in_the_output(kind: str, backend: str) -> None:
    q, k, v, g, state = token(Case(kind=kind))
    g.view(-1)[0] = torch.nan
    assert gated_linear_attention_step(q, k, v, g, state, backend=backend).isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_strides_are_free_but_for_the_state(kind: str, backend: str) -> None:
    def strided(x: Tensor | None) -> Tensor | None:  # the same values, gaps between channels, heads outermost
        return None if x is None else x.repeat_interleave(2, -1).movedim(-2 if x.dim() > 1 else 0, 0).contiguous()

    def back(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., ::2] if x.dim() == 1 else x.movedim(0, -2)[..., ::2]

    q, k, v, g, state = token(Case(kind=kind, B=2, H=3))
    views = [back(strided(x)) for x in (q, k, v, g)]
    assert not any(x is not None and x.is_contiguous() for x in views)
    same = state.clone()
    o = gated_linear_attention_step(*views, same, backend=backend)
    assert torch.equal(o, gated_linear_attention_step(q, k, v, g, state, backend=backend))
    assert torch.equal(same, state)
    assert o.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_launch_on_its_own_inputs_without_copies(
    kind: str, launches: list[tuple[int, dict[str, Any]]]
) -> None:
    """So a gate without channels is not widened to K of them on the way."""
    q, k, v, g, state = token(Case(kind=kind, B=2))
    gated_linear_attention_step(q, k, v, g, state, backend="auto" if GPU else "triton")
    ((_, arguments),) = launches
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("state", state)):
        assert arguments[name] is x or arguments[name].data_ptr() == x.data_ptr()
        assert x is None or arguments[name].shape == x.shape


def test_the_torch_backend_launches_nothing(launches: list[tuple[int, dict[str, Any]]]) -> None:
    gated_linear_attention_step(*token(Case()), backend="torch")
    assert launches == []


@pytest.mark.parametrize("view", ["q", "k", "v"])
def test_what_is_read_may_be_a_view_of_the_state_on_the_torch_backend(view: str) -> None:
    q, k, v, g, state = token(Case(kind="channel", B=2, K=16, V=16))
    given = {"q": q, "k": k, "v": v, "g": g}
    want_state = state.clone()
    want = gated_linear_attention_step(
        **given | {view: state[:, :, 0].clone()}, state=want_state, scale=1.0, backend="torch"
    )
    o = gated_linear_attention_step(**given | {view: state[:, :, 0]}, state=state, scale=1.0, backend="torch")
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(state, want_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    q, k, v, g, state = token(Case())
    assert gated_linear_attention_step(q[:0], k[:0], v[:0], g[:0], state[:0], backend=backend).shape == v[:0].shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_multiplies_the_output_alone(backend: str) -> None:
    *given, state = token(Case())
    states = [state.clone() for _ in range(3)]
    one, half, default = (
        gated_linear_attention_step(*given, s, scale=scale, backend=backend)
        for s, scale in zip(states, (1.0, 0.5, None), strict=True)
    )
    torch.testing.assert_close(half, one / 2)
    torch.testing.assert_close(default, one * Case().K ** -0.5)
    assert all(torch.equal(s, states[0]) for s in states)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS if GPU else ("torch",))
def test_mixed_dtypes_are_promoted_for_the_output_alone(backend: str, autocast: bool) -> None:
    """Every value is exact in bf16, and neither a cast of v nor autocast rounds what is computed with them."""
    q, k, v, g, state = token(Case(kind="token"))
    same = state.clone()
    want = gated_linear_attention_step(q, k, v, g, state, backend="torch")
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        o = gated_linear_attention_step(q.bfloat16(), k.bfloat16(), v, g.double(), same, backend=backend)
    assert o.dtype == torch.float32
    torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, state, rtol=1e-6, atol=1e-6)


def test_same_input_gives_the_same_bits() -> None:
    *given, start = token(Case(B=2, K=100, V=70))
    states = [start.clone() for _ in range(4)]
    outputs = [gated_linear_attention_step(*given, state, backend="triton") for state in states]
    assert all(torch.equal(o, outputs[0]) for o in outputs)
    assert all(torch.equal(state, states[0]) for state in states)


B, H, K, V = 2, 3, 8, 6


def arguments(**changes: Any) -> dict[str, Any]:
    given = {
        "q": torch.randn(B, H, K),
        "k": torch.randn(B, H, K),
        "v": torch.randn(B, H, V),
        "g": -torch.rand(B, H, K),
        "state": torch.randn(B, H, K, V),
        "backend": "triton",
        **changes,
    }
    return {name: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x for name, x in given.items()}


REFUSED = {
    "q of a sequence": ({"q": torch.randn(B, 1, H, K)}, r"q: got shape \[2, 1, 3, 8\], takes three dimensions"),
    "q of integers": ({"q": torch.ones(B, H, K, dtype=torch.long)}, "q: got dtype torch.int64"),
    "q a list": ({"q": [1.0]}, "q: got list"),
    "k of other heads": ({"k": torch.randn(B, H + 1, K)}, "k: got shape"),
    "state of q's heads, k of fewer": (
        {"k": torch.randn(B, 1, K), "v": torch.randn(B, 1, V), "g": None},
        r"state: got shape .* takes \[2, 1, 8, 6\]",
    ),
    "k on another device": ({"k": torch.empty(B, H, K, device="meta")}, "k: got a tensor on meta"),
    "v of another batch": ({"v": torch.randn(B + 1, H, V)}, r"v: got shape \[3, 3, 6\], takes \[2, 3, V\]"),
    "v too wide": ({"v": torch.randn(B, H, 513)}, "v: got 513 channels"),
    "v without channels": ({"v": torch.randn(B, H, 0)}, "v: got 0 channels"),
    "no channels": ({"q": torch.randn(B, H, 0), "k": torch.randn(B, H, 0)}, "q: got 0 channels"),
    "g of the batch's size": ({"g": torch.zeros(B)}, "g: got shape"),
    "g of a sequence": ({"g": torch.zeros(B, 1, H, K)}, "g: got shape"),
    "g of value channels": ({"g": torch.zeros(B, H, V)}, "g: got shape"),
    "g of integers": ({"g": torch.zeros(H, dtype=torch.int32)}, "g: got dtype"),
    "g a number": ({"g": -0.1}, "g: got float"),
    "no state": ({"state": None}, "state: got None"),
    "state a list": ({"state": [0.0]}, "state: got list"),
    "state of another shape": ({"state": torch.zeros(B, H, V, K)}, "state: got shape"),
    "state in bf16": ({"state": torch.zeros(B, H, K, V).bfloat16()}, "state: got dtype torch.bfloat16, takes float32"),
    "state in fp64": ({"state": torch.zeros(B, H, K, V).double()}, "state: got dtype torch.float64, takes float32"),
    "state on another device": ({"state": torch.empty(B, H, K, V, device="meta")}, "state: got a tensor on meta"),
    "fp32 state of fp64 inputs": ({"q": torch.zeros(B, H, K).double()}, "state: got dtype torch.float32"),
    "transposed state": ({"state": torch.zeros(B, H, V, K).mT}, r"state: got strides \[144, 48, 1, 8\]"),
    "state that requires grad": ({"state": torch.zeros(B, H, K, V, requires_grad=True)}, "state: .* state.detach()"),
    "q that requires grad": ({"q": torch.randn(B, H, K, requires_grad=True)}, "q: .* torch.no_grad"),
    "g that requires grad": ({"g": torch.zeros(H, requires_grad=True)}, "g: .* or use gated_linear_attention"),
    "scale of a word": ({"scale": "x"}, "scale: got 'x', takes a finite number"),
    "unknown backend": ({"backend": "cuda"}, "backend: got 'cuda'"),
    "fp64 on triton": (
        {"q": torch.zeros(B, H, K).double(), "state": torch.zeros(B, H, K, V).double()},
        "backend: got 'triton' with float64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument_and_launch_nothing(name: str, launches: list[tuple[int, dict[str, Any]]]) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        gated_linear_attention_step(**arguments(**changes))
    assert launches == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_require_grad_are_no_obstacle_without_gradients(backend: str, mode: Any) -> None:
    given = arguments(backend=backend)
    want = gated_linear_attention_step(**given | {"state": given["state"].clone()})
    with mode():
        given |= {name: given[name].clone().requires_grad_() for name in ("q", "k", "v", "g")}
        o = gated_linear_attention_step(**given)
        assert torch.equal(o, want)
        gated_linear_attention_step(**given | {"state": torch.zeros(B, H, K, V, device=DEVICE)})  # made in the mode


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_passes(kind: str) -> None:
    for group in (1, 2):
        given = token(Case(kind=kind, K=4, V=3, group=group))
        *operands, state = given
        gv = None if group == 1 else -torch.rand_like(operands[2])
        torch.library.opcheck(torch.ops.gla_ablate.step.default, (*operands, gv, state, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind: str, backend: str) -> None:
    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> Tensor:
        o = gated_linear_attention_step(q * 2, k, v, g, state, backend=backend)
        return o + gated_linear_attention_step(q, k, v, g, state, backend=backend).sin()

    *given, state = token(Case(kind=kind, K=4, V=3))
    same = state.clone()
    compiled = torch.compile(op, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    torch.testing.assert_close(compiled(*given, same), op(*given, state), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, state, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not GPU, reason="CUDA graphs are the GPU's")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_captures_it_and_replays_on_the_same_state(kind: str) -> None:
    *given, start = token(Case(kind=kind, B=2, K=64, V=96))
    eager = start.clone()
    want = [gated_linear_attention_step(*given, eager) for _ in range(3)]  # compiles the kernel too
    state, graph = start.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gated_linear_attention_step(*given, state)
    assert torch.equal(state, start)  # capturing runs nothing
    for ref in want:
        graph.replay()
        assert torch.equal(o, ref)
    assert torch.equal(state, eager)


@pytest.mark.skipif(
    not GPU or torch.cuda.get_device_properties(0).total_memory < 24e9, reason="a state of 8.6 GB needs a large GPU"
)
def test_offsets_pass_two_to_the_31() -> None:
    heads = 2**31 // (256 * 512) + 2  # the last heads lie past 2^31 numbers of state
    state = torch.zeros(1, heads, 256, 512, device=DEVICE)
    q, k, v = (torch.randn(1, heads, n, device=DEVICE) for n in (256, 256, 512))
    o = gated_linear_attention_step(q, k, v, None, state)
    last = torch.zeros(1, 4, 256, 512, device=DEVICE)
    want = gated_linear_attention_step(q[:, -4:], k[:, -4:], v[:, -4:], None, last)
    torch.testing.assert_close(o[:, -4:], want)
    torch.testing.assert_close(state[:, -4:], last)
