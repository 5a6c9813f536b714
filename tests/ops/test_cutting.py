"""Where tiles, chunks and segments of a call lie, and how programs share them out."""

from dataclasses import replace

import pytest
import torch

from gla_ablate.ops.kernels import call as calls
from tests.ops.cases import DEVICE


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
