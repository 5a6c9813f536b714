"""The op against the recurrent form in fp64: o, the final state and every gradient, on both backends.

Without a GPU the kernels run in the interpreter: small, and in fp32, since its 16-bit arithmetic isn't the hardware's.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from gla_ablate.ops.kernels import (
    blocks,
    call,
    cutting,
    decay,
    gradient_channel,
    gradient_steep,
    lookback,
    prepare,
    prepare_steep,
    tuning,
)
from tests.ops.cases import GPU, KINDS, STRENGTHS, Case, check, computed, errors

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # of pairs above the diagonal, which are masked: there both factors may grow towards the centre of a block
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32,)
SIZE = Case(B=2, T=1000, H=4, K=128, V=256) if GPU else Case()

GATES = [
    replace(SIZE, kind=kind, strength=strength)
    for kind in KINDS
    for strength in (STRENGTHS if kind != "none" else ("usual",))
] + [replace(SIZE, strength="uneven")]
CHUNKS = [
    replace(SIZE, kind=kind, strength=strength, H=SIZE.H if GPU else 1, chunk=chunk)
    if GPU
    else Case(kind, strength, T=max(70, chunk + 14), H=1, chunk=chunk)
    for kind in KINDS
    for chunk in (16, 32, 128, 256)
    for strength in ("usual", "resets")
    if (kind in ("token", "channel") or strength == "usual") and (GPU or strength == "usual" or chunk == 128)
]
SHAPES = [
    replace(Case(kind=kind), **size)
    for kind in KINDS
    for size in (
        {"T": 1},
        {"T": 64, "B": 2, "chunk": 32},
        {"T": 65, "K": 7, "V": 33, "chunk": 32},
        {"T": 17, "K": 80, "V": 3, "chunk": 16},
        {"T": 20, "K": 16, "V": 130, "H": 1},
        {"T": 33, "K": 1, "V": 1, "H": 3},
    )
]
LARGE = [
    replace(Case(kind=kind, T=300 if GPU else 20, H=1), K=K, V=V)
    for kind in KINDS
    for K, V in (((512, 512),) if GPU else ((512, 16), (16, 512)))
]
SPANS = [
    Case(strength="turning", T=300, chunk=32),
    Case(strength="strong", T=220, H=1, chunk=32, lengths=(70, 0, 33, 117), group=2),
]
# tiles that end at odd places compile to other machine code, of which each is checked
TAILS = [
    Case(kind=kind, K=K, V=V, T=70)
    for kind in (("token", "channel") if GPU else ("channel",))
    for K, V in (
        ((8, 8), (20, 28), (24, 24), (40, 36), (48, 96), (64, 64), (72, 40), (96, 192), (100, 44), (256, 64))
        if GPU
        else ((40, 36),)
    )
]
PACKED = [
    replace(Case(kind=kind, strength=strength), T=sum(lengths), lengths=lengths, chunk=chunk)
    for kind in KINDS
    for strength, lengths, chunk in (
        ("usual", (0, 40, 0, 1, 64, 0, 35, 0), 64),
        ("usual", (150, 3, 0, 20), 128),
        ("resets", (33, 16, 31), 16),
    )
] + [Case(kind=kind, T=100, H=1, K=40, V=70, lengths=(33, 0, 67)) for kind in ("none", "head", "token")]
# sequences long enough, and heads few enough, to be cut into segments (without a GPU: `cut_short`)
LONG = [
    replace(
        Case(kind=kind, strength=strength), H=1, K=K, V=16, T=sum(lengths), lengths=lengths[1:] and lengths, chunk=32
    )
    for kind in KINDS
    for strength, K, lengths in (
        ("usual", 16, (2100 if GPU else 200,)),
        ("usual", 80, (2100 if GPU else 200,)),  # in fp32 and fp16 narrow heads look back, others don't
        ("turning", 80 if kind == "token" else 16, (1200, 0, 900) if GPU else (130, 0, 75)),
    )
]
BARE = [replace(case, bare=True) for case in (LONG if GPU else LONG[:1] + LONG[5:6] + LONG[-1:])] + [
    replace(LONG[-1], bare=True, recompute=True),
    replace(LONG[-1], bare=True, group=2),
]
# the widths whose launch parameters were tuned, in sequences that end with a tile and in others
WIDE = [
    replace(Case(kind=kind, strength=strength, B=2), T=T, K=K, V=V, chunk=chunk)
    for kind in KINDS
    for strength in ("usual", "strong", "turning")
    for K, V in ((256, 512), (128, 128), (256, 256), (64, 64))
    for T, chunk in ((512, 128), (512, 64), (440, 256))
    if GPU
]
# what a scan whose programs take 128 columns of V meets: whole sequences and others, packed ones, and such as are cut
SCANS = [
    replace(Case(kind=kind, strength=strength), K=K, V=V, **size)
    for kind in KINDS
    for strength in ("usual", "turning")
    for K, V in ((128, 128), (128, 256), (80, 160))
    for size in (
        {"B": 2, "T": 512, "chunk": 128},
        {"B": 2, "T": 440, "chunk": 256},
        {"T": 512, "chunk": 128, "lengths": (70, 0, 442)},
        {"T": 2100, "H": 1, "chunk": 128},
    )
    if GPU
]
# heads of q that share one of k, v and g: whole sequences, packed ones, segments, several tiles a chunk, wide heads
GROUPED = [
    replace(Case(kind=kind, strength=strength, group=group), **size)
    for kind in KINDS
    for group, strength, size in (
        (2, "usual", {"B": 2}),
        (3, "resets", {"T": 100, "H": 1, "chunk": 128, "lengths": (33, 0, 67), "recompute": True}),
        *(((4, "turning", {"B": 2, "T": 512, "K": 128, "V": 128, "chunk": 128}),) if GPU else ()),
        *(((8, "strong", {"T": 512, "H": 1, "K": 256, "V": 256, "chunk": 128}),) if GPU else ()),
    )
]
CUT = (
    LONG
    + BARE
    + [
        replace(Case(kind=kind, strength="turning", group=2), T=1000 if GPU else 200, H=1, K=16, V=16, chunk=32)
        for kind in KINDS
    ]
)
AGAIN = [replace(Case(kind=kind, strength="turning", recompute=True), chunk=32) for kind in KINDS] + [
    replace(LONG[-1], group=2, recompute=True, lengths=())
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GATES, ids=lambda case: case.id)
def test_every_gate_strength_is_right(case: Case, backend: str, dtype: torch.dtype) -> None:
    check(case, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CHUNKS, ids=lambda case: case.id)
def test_every_chunk_size_is_right(
    case: Case, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:  # so that narrow heads take the kernels of wide ones here
        monkeypatch.setattr(call, "NARROW", 0)
    check(case, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHAPES + LARGE + TAILS, ids=lambda case: case.id)
def test_every_shape_is_right(case: Case, backend: str, dtype: torch.dtype) -> None:
    check(case, backend, dtype)


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one or two tiles in the interpreter, so that sequences of a few are cut as those of thousands are."""
    if not GPU:
        monkeypatch.setattr(cutting, "SHORTEST", 2)
        monkeypatch.setattr(lookback, "AT_ONCE", tl.constexpr(2))


@pytest.mark.usefixtures("cut_short")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.id)
def test_sequences_cut_into_segments_are_right(
    case: Case, backend: str, dtype: torch.dtype, launches: list[tuple[str, dict[str, Any]]]
) -> None:
    check(case, backend, dtype)
    beforehand = any(name == "segments_kernel" for name, _ in launches)
    looks_back = any(given.get("LOOKS_BACK") for _, given in launches)
    if backend == "torch":
        assert not (beforehand or looks_back)
    else:
        narrow = case.kind != "channel" and case.K <= call.NARROW and case.chunk == call.NUMERICS[dtype].tile
        assert (beforehand, looks_back) == (not narrow, narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_packed_sequences_are_right_empty_ones_too(case: Case, backend: str, dtype: torch.dtype) -> None:
    check(case, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.id)
def test_grouped_heads_are_right(case: Case, backend: str, dtype: torch.dtype) -> None:
    check(case, backend, dtype)


# of which scans form the scores: V is one tile of a program, 64 columns in bf16, else 16
OWN = [
    replace(Case(kind=kind, strength=strength, K=40, V=16), **size)
    for kind, strength in (("none", "usual"), ("head", "usual"), ("head", "strong"))
    for size in (
        {"B": 2},
        {"T": 64, "group": 2, "bare": True},
        {"T": 130, "H": 1, "K": 64, "recompute": True},
        {"T": 205, "H": 1, "lengths": (130, 0, 75)},
        *(({"T": 1024, "K": 64, "V": 64}, {"T": 1000, "B": 3, "K": 48, "V": 64}) if GPU else ()),
        *(({"T": 2100, "K": 64, "V": 64, "lengths": (1200, 0, 900)},) if GPU else ()),
    )
]


@pytest.mark.usefixtures("cut_short")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.id)
def test_scans_that_form_the_scores_are_right(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launches: list[tuple[str, dict[str, Any]]]
) -> None:
    monkeypatch.setattr(call.Call, "forms_dv", False)  # else they are for the way forward alone
    check(case, "triton", dtype)
    formed = {arguments.get("OWN", False) for _, arguments in launches}
    assert formed == {False, True} or (case.V == 64 and dtype != torch.bfloat16)


# whose kernel for narrow heads forms dv as well
NARROW = [
    replace(Case(kind=kind, strength=strength, K=40, V=24), **size)
    for kind, strength in (("none", "usual"), ("head", "strong"), ("token", "usual"), ("token", "resets"))
    for size in (
        {"T": 100, "H": 1, "V": 40, "lengths": (33, 0, 67), "recompute": strength == "usual"},
        *(({"T": 64, "group": 2, "bare": True},) if GPU or kind != "token" else ()),
        *(({"T": 200, "H": 1, "K": 16, "V": 16, "chunk": 32},) if GPU or kind != "head" else ()),  # cut
        *(
            (
                {"T": 1024, "B": 3, "K": 64, "V": 64},
                {"T": 1000, "K": 64, "V": 64, "group": 2},
                {"T": 300, "K": 32, "V": 64},
                {"T": 40, "K": 64, "V": 64},
                {"T": 450, "K": 64, "V": 40, "B": 3, "group": 2},
                {"T": 2100, "H": 1, "K": 64, "V": 64},
                {"T": 2100, "H": 1, "K": 64, "V": 64, "lengths": (1200, 0, 900)},
                {"T": 2100, "H": 17, "K": 64, "V": 64, "lengths": (1100, 57, 943)},
                {"T": 100000, "H": 1, "K": 64, "V": 64, "lengths": (99900, 100)},  # more segments than AT_ONCE
                {"T": 1100, "H": 8, "B": 8, "K": 48, "V": 40},
            )
            if GPU
            else ()
        ),
    )
]


@pytest.mark.usefixtures("cut_short")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.id)
def test_a_kernel_that_forms_the_gradient_of_v_too_is_right(
    case: Case,
    span: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, dict[str, Any]]],
) -> None:
    monkeypatch.setattr(call.Call, "span", span)  # tiles a program
    if span > 1 and not GPU:  # where only what `Call` takes has been seen to compile right
        monkeypatch.setattr(call.Call, "turns", property(lambda own: 1 if own.segments.inner else span))
    check(case, "triton", dtype)
    scans = {arguments["REVERSE"] for name, arguments in launches if name == "scan_kernel"}
    assert scans == {False} or (case.chunk < 64 and dtype == torch.bfloat16)


@pytest.mark.skipif(not GPU, reason="the interpreter would take hours")
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.id)
def test_every_tuned_width_is_right(case: Case) -> None:
    check(case, "triton", torch.bfloat16)


@pytest.mark.skipif(not GPU, reason="in fp32, which the interpreter takes, no program is so wide")
@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.id)
def test_scans_of_wide_programs_are_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call.Call, "wide", True)
    check(case, "triton", torch.bfloat16)


@pytest.mark.usefixtures("cut_short")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AGAIN, ids=lambda case: case.id)
def test_what_the_forward_pass_did_not_keep_is_formed_anew(case: Case, dtype: torch.dtype) -> None:
    kept, formed = (computed(c, "triton", dtype) for c in (replace(case, recompute=False), case))
    assert all(torch.equal(kept[name], formed[name]) for name in kept)


SMALL = [
    replace(Case(kind=kind, strength=strength), T=150, H=1, K=40, V=24, chunk=chunk, lengths=lengths, group=group)
    for kind in KINDS
    for strength, chunk, lengths, group in (
        ("turning", 256, (), 1),
        ("usual", 128, (70, 0, 80), 1),
        ("turning", 128, (), 2),
    )
]

BLOCKS = [
    replace(Case(strength=strength, T=T, H=1, K=40, V=24), **more)
    for strength, T, more in (
        ("strong", 47, {}),
        ("uneven", 81, {"group": 2}),
        ("strong", 130, {"lengths": (33, 0, 97)}),
        ("uneven", 100, {"values": "usual"}),
        ("usual", 70, {"values": "strong"}),
    )
]


@pytest.mark.skipif(GPU, reason="bf16 runs so on a GPU, where fp32 would not fit")
@pytest.mark.parametrize("case", SMALL + BLOCKS, ids=lambda case: case.id)
def test_chunks_of_several_large_tiles_are_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bf16 has them on a GPU, in the interpreter's fp32: 64 rows a tile, up to 4 tiles between two states, half a
    steep tile as two blocks."""
    wide, narrow = call.NUMERICS[torch.float32], call.NUMERICS[torch.bfloat16]
    # 8 rows of 2^15 each are what fp32 has room for
    large = replace(narrow, store=wide.store, precision=wide.precision, mild=wide.mild, bound=-15.0)
    monkeypatch.setitem(call.NUMERICS, torch.float32, large)
    check(case, "triton", torch.float32)


@triton.jit
def two_parts(b, DTYPE: tl.constexpr):
    """`parts` of bf16, but as fp32, which the interpreter multiplies rightly."""
    high = (b.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return (high, b - high)


@pytest.mark.skipif(GPU, reason="there bf16 runs so")
@pytest.mark.parametrize("lengths", [(), (70, 0, 58)], ids=["whole", "packed"])
@pytest.mark.parametrize("strength", [*STRENGTHS, "uneven"])
def test_two_halves_and_the_anchors_of_16_bits_are_right(
    strength: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = replace(call.NUMERICS[torch.bfloat16], store=torch.float32)
    monkeypatch.setitem(call.NUMERICS, torch.float32, narrow)
    for module in (blocks, decay, prepare, prepare_steep, gradient_channel, gradient_steep):
        if hasattr(module, "parts"):
            monkeypatch.setattr(module, "parts", two_parts)
    case = replace(Case(strength=strength), T=128, H=1, K=32, V=16, chunk=128, lengths=lengths)
    found = errors(case, computed(case, "triton", torch.float32))
    assert all(error < 1e-3 for error in found.values()), found


COPIED = [
    replace(case, T=64 if whole else 80, K=64, V=32, chunk=32, lengths=(33, 0, 47) if case.lengths else ())
    for whole in (True, False)
    for case in SMALL
    if not (whole and case.lengths) and (case.group == 1 or not whole)
]


@pytest.mark.skipif(GPU, reason="there every width that fits runs so")
@pytest.mark.parametrize("case", COPIED, ids=lambda case: case.id)
def test_the_copy_engine_brings_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands through tensor descriptors, in several slices of K."""
    shipped = tuning.largest
    monkeypatch.setattr(
        tuning, "largest", lambda name, *rest: tuning.Tuning(16, 8, 4, 1) if "scan" in name else shipped(name, *rest)
    )
    tuning.tuning.cache_clear()
    described: dict[str, set[Any]] = {}
    real = call.launch

    def look_on(kernel: Any, grid: int, key: Any = None, **arguments: Any) -> None:
        if "DESC" in arguments:
            marks = tuple(arguments[name] for name in ("DESC", "DESC_X", "WHOLE") if name in arguments)
            described.setdefault(kernel.fn.__name__, set()).add(marks)
        real(kernel, grid, key, **arguments)

    monkeypatch.setattr(call, "launch", look_on)
    monkeypatch.setattr(call, "NARROW", 0)
    try:
        check(case, "triton", torch.float32)
    finally:
        tuning.tuning.cache_clear()
    whole = case.T % 32 == 0
    names = ["gradient_kernel"]
    if case.kind == "channel":
        names = ["prepare_kernel", "steep_prepare_kernel", "channel_gradient_kernel", "steep_gradient_kernel"]
    scans = {(True, True, True)} if whole else {(True, True, False), (True, False, False)}  # backward through pointers
    assert described == {name: {(True, whole)} for name in names} | {"scan_kernel": scans}


@pytest.mark.parametrize("case", SPANS, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("busy", "span"), [(0, 4), (2, 2)])
def test_a_program_that_looks_through_several_tiles(
    case: Case,
    busy: int,
    span: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[tuple[str, dict[str, Any]]],
) -> None:
    """As it does for steep tiles where there are many: of a program's tiles none is, some are, or some don't exist."""
    monkeypatch.setattr(call, "BUSY", busy)
    check(case, "triton", dtype)
    assert {arguments["SPAN"] for name, arguments in launches if name.startswith("steep")} == {span}
