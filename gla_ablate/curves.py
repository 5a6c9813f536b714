"""`metrics.csv`, a trial's curves in long form."""

from __future__ import annotations

from pathlib import Path

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


def can_be_read(path: Path) -> bool:
    """Whether the file is what it should be, or there is none."""
    return read(text_of(path)) is not None
