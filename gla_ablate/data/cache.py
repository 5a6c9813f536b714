"""A folder for prepared data: written once, by one process, and complete or absent for everyone else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from gla_ablate.errors import ConfigError


def cache_folder() -> Path:
    """`$GLA_ABLATE_CACHE`, else `gla_ablate` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("GLA_ABLATE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gla_ablate"


def prepared(name: str, identity: Any, write: Callable[[Path], None]) -> Path:
    """The cache's folder for `identity`; `write` fills it if it isn't there yet.

    `identity` is JSON that decides the content: another identity is another folder. Any number of processes may ask at
    once: one writes, beside the final place and under a lock, and a rename makes the folder visible whole; the others
    wait. Raises `ConfigError` when the cache can't be written to.
    """
    folder = cache_folder() / "data" / f"{name}-{short_hash(identity)}"
    if folder.is_dir():
        return folder
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"$GLA_ABLATE_CACHE: cannot write to {folder.parent} ({error.strerror}); name a folder that can be written"
        ) from None
    try:
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
            unfinished.mkdir()
            write(unfinished)
            unfinished.rename(folder)
    finally:
        lock.release()
    return folder


def short_hash(identity: Any) -> str:
    """16 hex digits that stand for a JSON value in the name of a file."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
