"""Local files as text."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gla_ablate.data.corpus import ByteCorpus, Document, Split, file_states, read_pieces
from gla_ablate.data.source import DATA, require
from gla_ablate.errors import ConfigError, nearest


@DATA.register("text")
class Text(ByteCorpus):
    """The files that glob patterns match (`**` crosses folders), each a document, in the order of their paths.

    With `val_files`, those are for validation and never for training. Without, the last `val_fraction` of every file
    is, so that one file is enough. Relative patterns start at the working directory.
    """

    name = "text"

    def __init__(
        self,
        *,
        seq_len: int = 256,
        batch_size: int = 8,
        val_tokens: int = 65_536,
        files: list[str],
        val_files: list[str] | None = None,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens)
        require(0 < val_fraction < 1, "val_fraction", val_fraction, "a fraction between 0 and 1")
        self.held_out = matching(val_files, "data.val_files") if val_files else []
        self.files = [path for path in matching(files, "data.files") if path not in self.held_out]
        require(bool(self.files), "files", files, "at least one file that isn't among val_files")
        self.val_fraction = val_fraction

    def identity(self) -> Any:
        # Only what is in force: a fraction that val_files overrules changes nothing.
        split = file_states(self.held_out) or self.val_fraction
        return [file_states(self.files), split]

    def documents(self, split: Split) -> Iterator[Document]:
        if self.held_out:
            key, files = ("data.files", self.files) if split == "train" else ("data.val_files", self.held_out)
            yield from (read_pieces(path, key) for path in files)
            return
        for path in self.files:
            cut = round(path.stat().st_size * (1 - self.val_fraction))
            start, stop = (0, cut) if split == "train" else (cut, None)
            yield read_pieces(path, "data.files", start, stop)


def matching(patterns: list[str], key: str) -> list[Path]:
    """The files that `patterns` match, sorted, each once. Raises `ConfigError` for a pattern without a file and for a
    file that can't be read."""
    found: set[Path] = set()
    for index, pattern in enumerate(patterns):
        expanded = Path(pattern).expanduser()
        named = [str(expanded)] if expanded.exists() else []  # a name may hold what means more in a pattern
        candidates = map(Path, named or glob.glob(str(expanded), recursive=True))
        paths = [path.resolve() for path in candidates if not path.is_dir()]
        if not paths and expanded.is_dir():
            raise ConfigError(
                f"{key}[{index}]: got {pattern!r}, a folder; {pattern.rstrip('/') + '/**'!r} takes its files"
            )
        if not paths:
            hint = nearest(expanded.name, os.listdir(expanded.parent)) if expanded.parent.is_dir() else ""
            raise ConfigError(f"{key}[{index}]: got {pattern!r}, which matches no file{hint}")
        for path in paths:
            if not (path.is_file() and os.access(path, os.R_OK)):
                raise ConfigError(f"{key}[{index}]: cannot read {path}, which {pattern!r} matches")
        found.update(paths)
    return sorted(found)
