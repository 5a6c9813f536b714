"""Which kernels a call launches, and with what: every launch passes `calls.launch`, where these tests look on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gla_ablate.ops import gated_linear_attention
from gla_ablate.ops.kernels import call as calls
from tests.ops.cases import DEVICE, GPU, KINDS, Case, leaves

CASE = Case(B=1, T=40, H=2, K=24, V=48, chunk=16)
KERNELS = {
    "channel": {
        *("survey_kernel", "prepare_kernel", "steep_prepare_kernel", "scan_kernel", "products_kernel"),
        *("channel_gradient_kernel", "steep_gradient_kernel"),
    },
    "others": {"scores_kernel", "scan_kernel", "products_kernel", "gradient_kernel"},
    "narrow": {"scores_kernel", "scan_kernel", "narrow_gradient_kernel"},
    "narrow, few": {"scores_kernel", "scan_kernel", "states_kernel", "narrow_gradient_kernel"},
    "own": {"scan_kernel", "narrow_gradient_kernel"},
    "own, few": {"scan_kernel", "states_kernel", "narrow_gradient_kernel"},
}
RUN_TIME = {"T", "NT", "NC", "SEG", "NSEG", "COUNT", "N", "SEGMENTS", "ROOM", "scale", "mild"}


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
    assert {name for name, _ in launches} == KERNELS["channel" if kind == "channel" else "others"]


@pytest.mark.parametrize(
    ("kind", "changes", "kernels"),
    [
        ("none", {}, "own, few"),
        ("none", {"B": 133}, "own"),  # more programs than multiprocessors
        ("head", {"K": 33, "B": 33, "H": 4}, "own, few"),
        ("head", {"K": 33, "B": 19, "H": 7}, "own"),
        ("head", {}, "narrow, few"),
        ("token", {}, "narrow, few"),
        ("token", {"B": 133}, "narrow"),
        ("none", {"V": 65}, "narrow"),
        ("none", {"lengths": (9, 11)}, "own, few"),
        ("token", {"lengths": (9, 11)}, "narrow, few"),
        ("none", {"T": 1536, "lengths": (1500, 36)}, "own, few, cut"),
        ("none", {"T": 1536}, "own, few, cut"),
        ("token", {"T": 1536, "V": 65}, "narrow, cut"),
        ("none", {"K": 65}, "others"),
        ("none", {"chunk": 16}, "others"),
        ("none", {"T": 70, "chunk": 128}, "others"),
        ("channel", {}, "channel"),
    ],
)
def test_narrow_heads_in_whole_tiles_take_fewer_kernels(
    kind: str, changes: dict[str, Any], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    looks_back: dict[bool, bool] = {}

    def launch(kernel: Any, *_: Any, **given: Any) -> None:
        seen.append(kernel.fn.__name__)
        if "LOOKS_BACK" in given:
            looks_back[given["REVERSE"]] = given["LOOKS_BACK"]

    monkeypatch.setattr(calls, "launch", launch)
    case = replace(Case(kind=kind, T=20, H=1, K=24, V=20, chunk=64), **changes)
    given = leaves(case, torch.bfloat16)
    q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
    packed = torch.tensor([0, *case.lengths], device=DEVICE).cumsum(0) if case.lengths else None
    o, _ = gated_linear_attention(q, k, v, g, cu_seqlens=packed, chunk_size=case.chunk, backend="triton")
    o.sum().backward()
    assert set(seen) - {"packing_kernel"} == KERNELS[kernels.removesuffix(", cut")]
    assert looks_back == dict.fromkeys((False, True), kernels.endswith(", cut"))
    assert seen.count("packing_kernel") == bool(case.lengths)  # the backward pass takes what the forward found


@pytest.mark.parametrize(
    ("changes", "registers"),
    [
        ({}, 168),
        ({"lengths": ()}, None),  # every tile is full: one way
        ({"K": 96}, None),  # not a multiple of a slice, so the copy engine has no part in it, and there is one way
        ({"kind": "channel"}, None),
    ],
)
def test_registers_are_held_back_where_a_kernel_has_two_ways(
    changes: dict[str, Any], registers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(calls, "launch", lambda kernel, *_, **given: seen.update({kernel.fn.__name__: given}))
    case = replace(Case(kind="head", T=128, H=1, K=128, V=32, chunk=128, lengths=(100, 28)), **changes)
    given = leaves(case, torch.bfloat16)
    q, k, v, g = (given[name].detach().requires_grad_(name != "g") for name in ("q", "k", "v", "g"))
    packed = torch.tensor([0, *case.lengths], device=DEVICE).cumsum(0) if case.lengths else None
    o, _ = gated_linear_attention(q, k, v, g, cu_seqlens=packed, chunk_size=case.chunk, backend="triton")
    o.sum().backward()
    name = "channel_gradient_kernel" if case.kind == "channel" else "gradient_kernel"
    assert seen[name].get("maxnreg") == registers


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
        if kind == "token" and arguments.get("decay") is not None:
            rows = B * -(-T // CASE.chunk) * CASE.chunk  # of tiles, which are chunks here
            assert arguments["decay"].numel() == 2 * rows * H
        else:
            assert arguments.get("decay") is None
        if isinstance(arguments.get("dg"), Tensor):
            assert arguments["dg"].numel() <= B * T * H * -(-K // 16)
        if isinstance(arguments.get("g"), Tensor):
            assert arguments["g"].shape == g.shape
        operands = ("a", "b") if name == "scan_kernel" else ("read", "write")
        for operand in operands:
            copy = arguments.get(operand)
            copy = getattr(copy, "base", copy)  # of a tensor descriptor
            if copy is not None:
                assert copy.data_ptr() in inputs, f"{name} reads a widened copy as {operand}"


def learned_and_not(kind: str, chunk: int) -> None:
    """Calls with a gate that is learned, and with one that isn't, whose other gradients are the same."""
    given = leaves(Case(**{**vars(CASE), "kind": kind}), torch.float32)
    q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
    found = []
    for gate in (g, g.detach()):
        o, _ = gated_linear_attention(q, k, v, gate, chunk_size=chunk, backend="triton")
        found.append(torch.autograd.grad(o.sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["head", "token"])
def test_a_gate_that_is_not_learned_costs_no_gradient(kind: str, launches: list[tuple[str, dict[str, Any]]]) -> None:
    learned_and_not(kind, CASE.chunk)
    kernels = [(a["flow"], a.get("dg")) for _, a in launches if "flow" in a]  # products and gradient, twice
    assert [flow is None for flow, _ in kernels] == [False, False, True, True]
    assert [dg is None for _, dg in kernels] == [True, False, True, True]


@pytest.mark.parametrize("kind", ["head", "token"])
def test_nor_does_it_for_narrow_heads(kind: str, launches: list[tuple[str, dict[str, Any]]]) -> None:
    learned_and_not(kind, chunk=32)
    learned = [(a["LEARNED"], a["dg"] is not None) for name, a in launches if name == "narrow_gradient_kernel"]
    assert learned == [(True, True), (False, False)]


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_heads_repeat_nothing(kind: str, launches: list[tuple[str, dict[str, Any]]]) -> None:
    """The kernels read k, v and g as they were given, keep one state for all query heads of a group, and one k̂."""
    case = Case(**{**vars(CASE), "kind": kind, "group": 3, "T": 17})
    given = leaves(case, torch.float32)
    q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
    o, _ = gated_linear_attention(q, k, v, g, chunk_size=CASE.chunk, backend="triton")
    o.sum().backward()
    states = [a["states"] for name, a in launches if name == "scan_kernel" and not a["REVERSE"]]
    assert [x.shape[1] for x in states] == [CASE.H]
    for _, arguments in launches:
        for name, x in (("k", k), ("v", v), ("g", g)):
            got = arguments.get(name)
            assert got is None or getattr(got, "base", got).data_ptr() == x.data_ptr()
        for name in ("kg", "decay", "halves", "steep"):  # [tiles, H, …]
            got = arguments.get(name)
            assert got is None or getattr(got, "base", got).shape[1] == CASE.H


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("strength", "seen", "steep", "hard"),
    [("strong", 1, 1, 1), ("weak", 0, 0, 0), ("uneven", 0, 1, 1), ("resets", 1, 1, 2)],
)
def test_what_is_known_of_a_tile_from_kernel_to_kernel(
    strength: str, seen: int, steep: int, hard: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its first channels, by all, and whether it has steps to cut."""
    given = leaves(Case(strength=strength, T=96, chunk=32, group=group), torch.float32)
    found: dict[str, Tensor] = {}
    real = calls.launch

    def look_on(kernel: Any, grid: int, key: Any = None, **arguments: Any) -> None:
        real(kernel, grid, key, **arguments)
        if "steep" in arguments:
            found.setdefault(kernel.fn.__name__, arguments["steep"].clone())

    monkeypatch.setattr(calls, "launch", look_on)
    gated_linear_attention(*(given[name] for name in ("q", "k", "v", "g")), chunk_size=32, backend="triton")
    assert found["survey_kernel"].unique().tolist() == [seen]
    assert found["prepare_kernel"].unique().tolist() == [steep]
    assert found["steep_prepare_kernel"].unique().tolist() == [hard]


def test_what_a_scalar_gate_takes_beside_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = calls.Call.new

    def new(self: calls.Call, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        out = real(self, *shape, dtype=dtype)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(calls.Call, "new", new)
    total, largest = {}, {}
    for kind in KINDS:
        sizes.clear()
        call(kind, "triton")
        total[kind], largest[kind] = sum(sizes), max(sizes)
    B, T, H, K = CASE.B, CASE.T, CASE.H, CASE.K
    per_row = B * T * H * 4
    tiles = B * -(-T // CASE.chunk)  # which are chunks here
    flow = tiles * H * K * 4
    assert total["token"] - total["none"] == per_row + 2 * tiles * CASE.chunk * H * 4 + flow  # dg, decay
    assert total["head"] - total["none"] == tiles * H * 4 + flow
    assert largest["token"] == largest["head"] == largest["none"]
    assert total["channel"] - total["none"] > per_row * K


def traits(arguments: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What Triton compiles for, but for alignment: constants, dtypes, descriptors, what is left out."""
    found = []
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            found.append((name, x.dtype))
        elif isinstance(x, TensorDescriptor):
            found.append((name, (x.base.dtype, *x.block_shape)))
        elif name not in RUN_TIME:
            found.append((name, x))
    return tuple(found)


def test_a_key_names_one_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel found under a key that another call left there would run with that call's constants."""
    seen: dict[Any, set[Any]] = {}

    def look_on(kernel: Any, grid: int, key: Any = None, **arguments: Any) -> None:
        assert key is not None
        seen.setdefault((kernel.fn.__name__, key), set()).add(traits(arguments))

    monkeypatch.setattr(calls, "launch", look_on)
    for kind, busy in (*((kind, 512) for kind in KINDS), ("channel", 0), ("channel", 2)):
        monkeypatch.setattr(calls, "BUSY", busy)
        for size in (
            {},
            {"H": 1},
            {"T": 64},
            {"K": 256, "T": 64},
            {"K": 256, "T": 70, "V": 128},
            {"H": 1, "T": 1000},
            {"V": 20},
            {"V": 16, "K": 40},
            {"group": 2},
            {"H": 4},
            {"H": 1, "T": 1000, "group": 2},
        ):
            for dtype in (torch.float32, torch.bfloat16):
                for chunk in (16, 64, 128):
                    for start in (True, False):
                        case = Case(**{**vars(CASE), "kind": kind, "chunk": chunk, **size})
                        given = leaves(case, dtype)
                        q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
                        first = given["initial_state"] if start else None
                        gate = g if start or g is None else g.detach()
                        for packed in (None, torch.tensor([0, 7, case.T], device=DEVICE)):
                            if first is not None and packed is not None:
                                first = torch.cat((first, first))
                            o, end = gated_linear_attention(
                                q, k, v, gate, initial_state=first, output_final_state=start, cu_seqlens=packed,
                                chunk_size=chunk, backend="triton", recompute=not start,
                            )  # fmt: skip
                            (o.sum() if end is None else o.sum() + end.sum()).backward()
    assert len(seen) > 300
    apart = {key: set.union(*map(set, found)) - set.intersection(*map(set, found)) for key, found in seen.items()}
    assert not {key: names for key, names in apart.items() if names}


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "initial_state"])
def test_a_tensor_that_starts_between_16_bytes_has_no_key(name: str) -> None:
    given = {n: x.detach() for n, x in leaves(CASE, torch.float32).items()}

    def key(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor) -> Any:
        return calls.Call(q, k, v, g, None, 1.0, CASE.chunk, (initial_state,)).key

    assert key(**given) is not None
    x = given[name]
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x)
    assert shifted.data_ptr() % 16
    assert key(**given | {name: shifted}) is None
