"""Where a trial's checkpoint lies, and how it is read: whole or not at all, and running nothing from it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


class Unusable(Exception):
    """A checkpoint that can't be gone on from, with the reason."""


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `path` holds, its tensors on the CPU and read as they are used. Raises `Unusable`."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # which torch doesn't look at
                raise Unusable(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Unusable:
        raise
    except Exception as error:  # of any kind: whatever the bytes make of their reader
        raise Unusable(f"it can't be read ({type(error).__name__})") from error
