"""`metrics.csv`, a trial's curves in long form."""

from __future__ import annotations

from pathlib import Path

HEADER = "step,metric,value"


def whole_lines(text: str) -> str:
    """`text` without a last line that is half written."""
    return text[: text.rfind("\n") + 1]


def are_sound(text: str) -> bool:
    """Whether the whole lines of a file's `text` are what `MetricsCSV` writes; the first is there at once."""
    header, *rows = whole_lines(text).splitlines() or [""]
    try:
        for row in rows:
            step, _, value = row.split(",")
            int(step), float(value)
    except ValueError:
        return False
    return not text or header == HEADER


def can_be_read(path: Path) -> bool:
    """Whether they are sound in this file, or there is none."""
    return not path.is_file() or are_sound(path.read_text(encoding="utf-8", errors="replace"))
