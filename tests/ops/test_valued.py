"""The gate on value channels: the op against the general recurrence in fp64, and what belongs to its operators.

Without a GPU the kernels run in the interpreter, in fp32; on one in all dtypes, at the widths that models have.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from gla_ablate.ops import gated_linear_attention, gated_linear_attention_step
from gla_ablate.ops.reference import parallel, recurrent
from tests.ops.cases import DEVICE, GPU, KINDS, STRENGTHS, Case, check, computed, inputs, leaves

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32,)
SMALL = Case(T=40, H=1, K=24, V=20, chunk=32, values="usual")

# every kind of gate on keys beside every strength of the gate on values
PAIRS = [
    replace(SMALL, kind=kind, strength=strength, values=values)
    for kind in KINDS
    for strength in (STRENGTHS if kind != "none" else ("usual",))
    for values in STRENGTHS
]
# what the interpreter has time for: each kind, and steep tiles on either axis, on both and on none
FEW = [
    replace(SMALL, kind="none", values="turning"),
    replace(SMALL, kind="head", strength="strong", T=20, chunk=16),
    replace(SMALL, strength="mixed", values="weak", T=20, chunk=16),
    replace(SMALL, strength="usual", values="strong", T=20, chunk=16),
]
# all pairs would take the torch backend a while
SOME = [case for case in PAIRS if case.kind != "head" and case.strength in ("usual", "strong", "resets")]
SHAPES = [
    replace(SMALL, T=1),
    replace(SMALL, kind="token", strength="resets", T=21, K=7, V=33, chunk=16, bare=True),
    replace(SMALL, T=24, K=9, V=3, chunk=16, group=2, lengths=(17, 0, 7)),
]
LARGE = [
    replace(Case(kind=kind, strength=strength, B=2, H=2, values=values), **size)
    for kind in KINDS
    for strength, values in (("usual", "usual"), ("turning", "strong"), ("strong", "turning"))
    for size in (
        {"T": 512, "K": 128, "V": 256},
        {"T": 440, "K": 256, "V": 512, "chunk": 128},
        {"T": 300, "K": 64, "V": 64, "group": 2},
        {"T": 270, "K": 16, "V": 100},
        {"T": 270, "K": 100, "V": 16},
        {"T": 270, "K": 512, "V": 40, "H": 1},
        {"T": 500, "B": 1, "K": 128, "V": 128, "lengths": (200, 0, 1, 299)},
        {"T": 2100, "B": 1, "H": 1, "K": 64, "V": 64},
    )
    if GPU
]


@pytest.mark.parametrize("case", PAIRS if GPU else SOME, ids=lambda case: case.id)
def test_torch_backend_is_right(case: Case) -> None:
    check(case, "torch", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (PAIRS if GPU else FEW) + SHAPES + LARGE, ids=lambda case: case.id)
def test_kernels_are_right(case: Case, dtype: torch.dtype) -> None:
    check(case, "triton", dtype)


@pytest.mark.parametrize(
    ("strength", "values", "want"), [("weak", "usual", 0), ("strong", "strong", 1), ("weak", "strong", 3)]
)
def test_both_axes_take_the_same_tiles_for_steep(
    strength: str, values: str, want: int, launches: list[tuple[str, dict[str, Any]]]
) -> None:
    """Along an axis that is mild nobody has looked for steps to cut, so there may be some."""
    computed(replace(SMALL, strength=strength, values=values, T=32), "triton", torch.float32)
    marks = [arguments["steep"].unique().tolist() for name, arguments in launches if name == "steep_gradient_kernel"]
    assert marks[-2:] == [[want], [want]]
    assert {arguments["steep"].dtype for _, arguments in launches if "steep" in arguments} == {torch.int32}


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_torch_backend_takes_every_shape(case: Case) -> None:
    check(case, "torch", torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gate_of_zeros_changes_nothing(backend: str) -> None:
    case = replace(SMALL, kind="token", T=20, values="")
    plain = computed(case, backend, torch.float32)
    given = leaves(case, torch.float32)
    gv = torch.zeros_like(given["v"])
    o, state = gated_linear_attention(
        *(given[name] for name in ("q", "k", "v", "g")), gv=gv, initial_state=given["initial_state"],
        output_final_state=True, chunk_size=case.chunk, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(o, plain["o"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, plain["state"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [0, 1, 30])
def test_parallel_form_agrees(kind: str, T: int) -> None:
    """Which holds α and β as the two factors of each pair's decay, in fp64."""
    case = Case(kind=kind, B=2, T=T, K=6, V=5, values="usual")
    given, _ = inputs(case)
    args = [given[name] for name in ("q", "k", "v", "g")]
    options = {"gv": given["gv"], "scale": 0.3, "initial_state": given["initial_state"]}
    for got, want in zip(parallel(*args, **options), recurrent(*args, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_recurrence(kind: str, backend: str) -> None:
    case = Case(kind=kind, B=2, T=3, H=2, K=9, V=17, group=2, values="usual")
    given = {name: None if x is None else x.float() for name, x in inputs(case)[0].items()}
    state, outputs = given["initial_state"].clone(), []
    for t in range(case.T):
        q, k, v, gv = (given[name][:, t] for name in ("q", "k", "v", "gv"))
        g = given["g"] if kind in ("none", "head") else given["g"][:, t]
        outputs.append(gated_linear_attention_step(q, k, v, g, state, gv=gv, backend=backend))
    want, want_state = recurrent(
        given["q"], *(None if x is None else x.repeat_interleave(2, -1 if x.dim() == 1 else 2)
                      for x in (given["k"], given["v"], given["g"])),
        gv=given["gv"].repeat_interleave(2, 2), scale=9**-0.5,
        initial_state=given["initial_state"].repeat_interleave(2, 1),
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(outputs, 1), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, want_state[:, ::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_operator_passes_opcheck(kind: str) -> None:
    case = replace(SMALL, kind=kind, T=6, K=8, V=8, chunk=16)
    given = leaves(case, torch.float32)
    q, k, v, g, gv, start = (given.get(name) for name in ("q", "k", "v", "g", "gv", "initial_state"))
    torch.library.opcheck(
        torch.ops.gla_ablate.valued_forward.default, (q, k, v, g, gv, start, None, 0.5, 16, True),
        # what compiles is tested below
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_block_compiles_as_one_graph() -> None:
    def layer(q, k, v, g, gv):
        return gated_linear_attention(q, k, v, g, gv=gv, backend="triton", chunk_size=16)[0].sum()

    case = replace(SMALL, T=6, K=8, V=8, chunk=16)
    given = [leaves(case, torch.float32)[name] for name in ("q", "k", "v", "g", "gv")]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, layer(*given))
    for got, want in zip(torch.autograd.grad(compiled, given), torch.autograd.grad(layer(*given), given), strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivative_raises() -> None:
    given = leaves(replace(SMALL, T=3), torch.float32)
    q, k, v, g, gv = (given[name] for name in ("q", "k", "v", "g", "gv"))
    o, _ = gated_linear_attention(q, k, v, g, gv=gv, backend="triton", chunk_size=16)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_wrong_gates_are_named() -> None:
    q, k, v = (torch.randn(1, 4, 2, n, device=DEVICE) for n in (8, 8, 6))
    with pytest.raises(ValueError, match=r"gv: got shape \[1, 4, 2, 8\], takes that of v, \[1, 4, 2, 6\]"):
        gated_linear_attention(q, k, v, gv=torch.zeros_like(k))
    with pytest.raises(ValueError, match=r"gv: got list, takes a tensor"):
        gated_linear_attention(q, k, v, gv=[0.0])
    gv = torch.zeros_like(v)
    gv[0, 2, 1, 3] = 0.5
    with pytest.raises(ValueError, match=r"gv: got 0.5 at index \[0, 2, 1, 3\], takes log decays ≤ 0"):
        gated_linear_attention(q, k, v, gv=gv, check_inputs=True)
    with pytest.raises(ValueError, match=r"gv: got shape \[1, 4, 2, 6\], takes that of v, \[1, 2, 6\]"):
        gated_linear_attention_step(q[:, 0], k[:, 0], v[:, 0], None, torch.zeros(1, 2, 8, 6, device=DEVICE), gv=gv)
