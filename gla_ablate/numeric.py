"""What counts as a number of a caller's: Python's `bool` is an `int`, and no number here."""

from __future__ import annotations

import math


def is_whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: object) -> bool:
    return isinstance(x, float) or is_whole(x)


def is_finite(x: float) -> bool:
    """Also of an integer that no float can hold."""
    try:
        return math.isfinite(x)
    except OverflowError:
        return False
