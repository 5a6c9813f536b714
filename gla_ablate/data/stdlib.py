"""The text of Python's own standard library: a corpus that needs no download."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gla_ablate.data.corpus import ByteCorpus, Document, Split, file_states, read_pieces
from gla_ablate.data.packing import hashed_to_validation
from gla_ablate.data.source import DATA

VAL_FRACTION = 0.1  # of the files
INSTALLED = {"site-packages", "dist-packages", "__pycache__"}  # folders that are no part of the library


@DATA.register("stdlib")
class Stdlib(ByteCorpus):
    """Every `.py` file of the interpreter's library, tests included: about 1,800 files and 30 MB.

    A file goes to training or validation by a hash of its path inside the library. The text differs between Python
    versions, which `stamp` shows.
    """

    name = "stdlib"

    def __init__(self, *, seq_len: int = 256, batch_size: int = 8, val_tokens: int = 65_536) -> None:
        super().__init__(seq_len, batch_size, val_tokens)

    def identity(self) -> list[tuple[str, int, int]]:
        return file_states(library_files())

    def documents(self, split: Split) -> Iterator[Document]:
        root = library_root()
        for path in library_files():
            held_out = hashed_to_validation(path.relative_to(root).as_posix(), VAL_FRACTION)
            if held_out == (split == "val"):
                yield read_pieces(path, "data.name")


def library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def library_files() -> list[Path]:
    """The library's `.py` files, sorted by path."""
    found = []
    for folder, subfolders, names in os.walk(library_root()):
        subfolders[:] = [name for name in subfolders if name not in INSTALLED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path for path in found if path.is_file())
