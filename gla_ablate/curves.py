"""`metrics.csv`, a trial's curves in long form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gla_ablate.numeric import is_number

HEADER = "step,metric,value"


def whole_lines(text: str) -> str:
    """`text` without a last line that is half written."""
    return text[: text.rfind("\n") + 1]


def read(text: str) -> list[tuple[int, str, float]] | None:
    """(step, metric, value) of each whole line of a file's `text`, which `MetricsCSV` writes; the header is there at
    once. None where the text is something else."""
    header, *lines = whole_lines(text).splitlines() or [""]
    if text and header != HEADER:
        return None
    rows = []
    try:
        for line in lines:
            step, metric, value = line.split(",")
            rows.append((int(step), metric, float(value)))
    except ValueError:
        return None
    return rows


def text_of(path: Path) -> str:
    """Of a file, with a sign of their own for bytes that are no text; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def are_whole(path: Path, result: Mapping[str, Any] | None) -> bool:
    """Whether the file is what it should be and ends as a finished trial's `result.json` tells: one that was cut short,
    emptied or lost doesn't."""
    rows = read(text_of(path))
    return rows is not None and ends_as_told({metric: value for _, metric, value in rows}, result)


def ends_as_told(last: Mapping[str, float], result: Mapping[str, Any] | None) -> bool:
    """Whether the last value of each metric is that of `result.json`, if that tells any."""
    told = (result or {}).get("metrics")
    if not isinstance(told, dict):
        return True
    return all(
        name in last and (last[name] == value or value != value)  # NaN
        for name, value in told.items()
        if is_number(value)
    )
