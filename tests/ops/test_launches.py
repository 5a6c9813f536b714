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


@pytest.mark.parametrize(
    ("strength", "seen", "steep"), [("strong", 1, 1), ("weak", 0, 0), ("uneven", 0, 1), ("resets", 1, 1)]
)
def test_the_first_look_finds_what_the_first_channels_show(
    strength: str, seen: int, steep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = leaves(Case(strength=strength, T=96, chunk=32), torch.float32)
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


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ([5, 0, 130, 64, 1], torch.int32),
        ([5, 0, 130, 64, 1], torch.int64),
        ([0], torch.int32),
        ([64] * 3, torch.int64),
        ([1] * 260 + [900], torch.int32),
    ],
    ids=["odd", "odd in int64", "empty", "full", "many"],
)
def test_where_tiles_and_chunks_of_packed_sequences_lie(lengths: list[int], dtype: torch.dtype) -> None:
    q = torch.empty(1, sum(lengths), 1, 16, device=DEVICE, dtype=torch.bfloat16)
    packed = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)
    own = calls.Call(q, q, q, None, packed, 1.0, 128)
    widths = {"tiles": 4, "segments": 4, "own_segments": 3}
    found = {
        name: (x.view(-1, widths[name]) if name in widths else x).tolist()
        for name, x in own.tables.items()
        if x is not None
    }
    n_tiles, n_chunks = ([-(-n // size) for n in lengths] for size in (own.bt, own.chunk))
    places = [(i, j) for i, n in enumerate(n_tiles) for j in range(n)]
    places += [(len(lengths) - 1, n_tiles[-1] + i) for i in range(own.tiles - len(places))]  # programs of no tile
    per_chunk = own.chunk // own.bt
    assert found["tiles"] == [[j, sum(lengths[:i]), lengths[i], sum(n_chunks[:i]) + j // per_chunk] for i, j in places]
    assert found["tile_base"] == [sum(n_tiles[:i]) for i in range(len(lengths))]
    assert found["chunk_base"] == [sum(n_chunks[:i]) for i in range(len(lengths))]
    # segments: from the longest on, each of whole chunks, together all tiles; a row for each of a sequence that is cut
    assert own.segments.size == 8 and own.segments.long == 12
    counts = [(n + 4) // 8 if n > 12 else 1 for n in n_tiles]
    each = [-(-n // count // per_chunk) * per_chunk for n, count in zip(n_tiles, counts, strict=True)]
    segments: list[list[int]] = []
    row = 0
    for i in sorted(range(len(lengths)), key=lambda i: -min(each[i], n_tiles[i])):
        assert found["own_segments"][i] == [len(segments), counts[i], row]
        for j in range(counts[i]):
            segments.append([i, j * each[i], min((j + 1) * each[i], n_tiles[i]), row + j])
        assert segments[-1][1] < segments[-1][2] or n_tiles[i] == 0
        row += counts[i] if counts[i] > 1 else 0
    assert row <= own.segments.inner and found["segments"][: len(segments)] == segments
    assert all(mark[0] == -1 for mark in found["segments"][len(segments) :])


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V", "wide"),
    [
        (16, 2048, 4, 128, 256, True),  # 128 wide programs fill 132 multiprocessors
        (4, 2048, 16, 128, 128, False),  # 64 wide ones leave half of them idle, where 128 narrow ones don't
        (2, 16384, 16, 128, 128, True),  # 32, of four segments each
        (2, 512, 16, 128, 128, False),  # too short for that
        (64, 64, 16, 64, 128, False),  # one slice of 64 channels: narrow ones leave room for a second program
        (64, 64, 16, 128, 64, False),
        (64, 64, 16, 256, 128, False),  # which has wide programs anyway
        (0, 64, 16, 128, 128, False),
        (1, 0, 16, 128, 128, False),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_scans_take_128_columns_where_that_fills_the_chip(
    B: int, T: int, H: int, K: int, V: int, wide: bool, packed: bool
) -> None:
    B, T, offsets = (1, B * T, torch.empty(B + 1, device="meta")) if packed else (B, T, None)
    k, v = (torch.empty(B, T, H, n, device="meta", dtype=torch.bfloat16) for n in (K, V))
    own = calls.Call(k, k, v, None, offsets, 1.0, 128)
    assert own.wide == wide and own.tuning(calls.scan_kernel).bv == (128 if (wide or K > 128) and V > 64 else 64)


@pytest.mark.parametrize(
    ("kind", "B", "T", "H", "K", "turns"),
    [
        ("none", 8, 1024, 8, 64, 2),
        ("head", 8, 1024, 8, 64, 2),
        ("token", 8, 1024, 8, 64, 1),
        ("token", 8, 512, 8, 32, 3),
        ("token", 8, 1024, 8, 32, 1),  # cut into segments of four tiles
        ("none", 16, 1024, 8, 64, 1),  # 128 programs fill the chip
        ("none", 1, 32768, 8, 64, 1),  # cut into segments, which do
        ("none", 8, 1024, 8, 128, 1),  # a state that both would form is most of the work
        ("channel", 8, 1024, 8, 64, 1),
    ],
)
def test_programs_take_turns_where_narrow_heads_have_few(kind: str, B: int, T: int, H: int, K: int, turns: int) -> None:
    q, v = (torch.empty(B, T, H, n, device="meta", dtype=torch.bfloat16) for n in (K, 64))
    g = {"none": None, "head": q[0, 0, :, 0], "token": q[..., 0], "channel": q}[kind]
    own = calls.Call(q, q, v, g, None, 1.0, 64)
    assert own.turns == turns
    assert replace(own, cu_seqlens=torch.empty(B + 1, device="meta"), q=q[:1], k=q[:1], v=v[:1]).turns == 1


@pytest.mark.parametrize(
    ("B", "T", "K", "each"),
    [
        (4, 8192, 256, 2),  # 64 programs of 132 multiprocessors
        (2, 16384, 256, 4),
        (8, 4096, 256, 1),
        (4, 960, 256, 1),  # segments of fewer than eight tiles
        (8, 1024, 128, 1),  # 64 programs of a smaller state
    ],
)
def test_sequences_are_cut_where_their_programs_leave_the_chip_idle(B: int, T: int, K: int, each: int) -> None:
    q, v = (torch.empty(B, T, 4, n, device="meta", dtype=torch.bfloat16) for n in (K, K if K == 128 else 512))
    assert calls.Call(q, q, v, None, None, 1.0, 256).segments.each == each


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "packed", "size"),
    [
        (8, 1024, 8, 64, True, 4),
        (2, 4096, 8, 64, True, 4),
        (16, 1024, 4, 32, False, 4),
        (1, 8192, 8, 64, False, 8),
        (1, 32768, 8, 64, False, 32),
        (1, 131072, 1, 64, True, 12),  # 171 segments: more would look back at too many
        (1, 131072, 1, 32, False, 13),
        (8, 1024, 8, 64, False, None),  # whole: programs take turns
        (16, 1024, 4, 128, True, None),  # of wider heads others find what they begin with
    ],
)
def test_segments_of_narrow_heads_look_back(B: int, T: int, H: int, K: int, packed: bool, size: int | None) -> None:
    B, T, offsets = (1, B * T, torch.empty(B + 1, device="meta")) if packed else (B, T, None)
    q = torch.empty(B, T, H, K, device="meta", dtype=torch.bfloat16)
    own = calls.Call(q, q, q, None, offsets, 1.0, 64)
    assert own.looks_back == (size is not None)
    assert size is None or own.segments.size == size


def test_the_largest_buffer_of_a_scalar_gate_is_no_larger_than_without_a_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    real = calls.Call.new

    def new(self: calls.Call, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        out = real(self, *shape, dtype=dtype)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(calls.Call, "new", new)
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
    for kind, busy in (*((kind, 512) for kind in KINDS), ("channel", 0)):
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
