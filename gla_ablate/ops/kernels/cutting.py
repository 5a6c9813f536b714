"""How sequences are cut into segments for scans, whose programs, each a sequence, would leave most of a chip idle."""

from __future__ import annotations

import math
from typing import NamedTuple

from gla_ablate.ops.kernels.tuning import pieces

FILLED = 132  # programs: one for each multiprocessor of an H100 or H200
SHORTEST = 8  # tiles in a segment


class Segments(NamedTuple):
    """Tiles of a segment (of packed sequences: about), tiles of a packed sequence up to which it stays whole, segments
    of a sequence if all have as many, segments in all at most, and those of sequences that have several: 0 where none
    has."""

    size: int
    long: int
    each: int
    total: int
    inner: int


def worth_looking_back(tiles: int) -> int:
    """Tiles in a segment, so that one sequence of them all has 4 √tiles segments at most: to look back at one takes a
    third as long as to go over a tile, and all of those before it are looked at."""
    return math.isqrt(max(tiles - 1, 0)) // 4 + 1


def cut_evenly(
    sequences: int, tiles: int, programs: int, filled: int, shortest: int, fewest: int, multiple: int
) -> Segments:
    """Sequences of so many tiles, each of which takes so many programs. `filled`: programs that the chip runs side by
    side; fewest: segments that are worth going over a sequence twice; multiple: tiles of a chunk."""
    count = min(filled // max(programs * sequences, 1), tiles // shortest)
    if count < fewest:
        return Segments(max(tiles, 1), tiles, 1, sequences, 0)
    size = pieces(pieces(tiles, count), multiple) * multiple
    each = pieces(tiles, size)
    return Segments(size, tiles, each, sequences * each, sequences * each)


def cut_packed(
    sequences: int, tiles: int, most: int, programs: int, filled: int, shortest: int, multiple: int
) -> Segments:
    """Packed sequences, whose lengths are on the device: what alone would take longer than all, if they were evenly
    shared out, is cut. `most`: tiles that they have at most, of which each may have one that isn't full."""
    share = pieces(tiles * programs, filled)
    size = pieces(max(pieces(share, 2), shortest, 2), multiple) * multiple  # there is no room for all of one tile
    long = max(share + share // 7, size + size // 2)
    if tiles <= long:
        return Segments(size, long, 1, sequences, 0)
    # one of t > 3/2 size tiles is cut in t/size + 1/2 at most, 4/3 of t/size, and its last tile may be short
    total = sequences + most // size
    return Segments(size, long, 1, total, min(total, pieces(3 * tiles, 2 * size)))
