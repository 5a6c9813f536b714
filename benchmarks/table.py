"""Rows as Markdown, and the record on disk that is complete after every row."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from measure import NAMES, Row

from gla_ablate.stamp import device_name, git_state, installed

COLUMNS = (
    *("shape", "gate", "op", *NAMES, "forward ms", "forward + backward ms", "replayed ms", "extra MiB", "kept MiB"),
    *("first call s", "of the floor", "FLA's time", "replayed"),
)
PACKAGES = ("gla_ablate", "triton", "flash-linear-attention")


def stamp() -> dict[str, Any]:
    """Where the numbers come from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": device_name(device),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
        | {"cudnn": torch.backends.cudnn.version()}
        | {name: installed(name) for name in PACKAGES},
        "git": git_state(Path(__file__).resolve().parent),
        "command": shlex.join(sys.orig_argv),
    }


def save(path: Path | None, record: dict[str, Any]) -> None:
    """Replace the file in one step, so that a run killed at any time leaves the rows that it had."""
    if path is not None:
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(part, path)


def header(columns: tuple[str, ...] = COLUMNS) -> str:
    return line(columns) + "\n" + "|" + "---|" * len(columns)


def line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def render(row: Row) -> str:
    """A row that has no speed says why in place of it."""
    errors = [scientific(row.errors, name) for name in NAMES]
    speed = [row.note, *[""] * (len(COLUMNS) - 4 - len(NAMES))]
    if not row.note:
        speed = [
            *(number(x, ".3f") for x in (row.forward_ms, row.both_ms)),
            several(".3f", row.forward_replay_ms, row.replay_ms),
            *(number(x, ".0f") for x in (row.extra_mib, row.kept_mib)),
            number(row.first_s, ".1f"),
            several(".0%", *shares(row)),
            several(".2f", row.fla_forward, row.fla_both, unit="×"),
            several(".2f", row.fla_forward_replay, row.fla_replay, unit="×"),
        ]
    return line([row.shape.name, row.kind, row.op, *errors, *speed])


def scientific(errors: dict[str, float | None], name: str) -> str:
    if name not in errors:
        return "–"
    return "not finite" if errors[name] is None else f"{errors[name]:.1e}"


def number(x: float | None, form: str) -> str:
    return "–" if x is None else format(x, form)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def shares(row: Row) -> tuple[float | None, float | None]:
    """Of the floor, forward and forward + backward; replayed, where there is a replay."""
    forward, both = row.forward_replay_ms or row.forward_ms, row.replay_ms or row.both_ms
    return ratio(row.floor_forward_ms, forward), ratio(row.floor_both_ms, both)


def several(form: str, *given: float | None, unit: str = "") -> str:
    if all(x is None for x in given):
        return "–"
    return " / ".join("–" if x is None else format(x, form) + unit for x in given)
