"""Text as bytes: what the sources that read text have in common."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gla_ablate.data.cache import prepared
from gla_ablate.data.packing import Packed, PackedRows, pack, row_count
from gla_ablate.data.source import DataSource, require
from gla_ablate.errors import ConfigError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
Document = Iterable[bytes]  # in pieces, so that a large one is never held whole

LAYOUT = 1  # of the cached files; raise it and every entry is made anew
PIECE = 1 << 20  # bytes read from a file at a time


class ByteCorpus(DataSource):
    """Documents whose bytes are the tokens, with byte 0 between them, packed into rows of `seq_len + 1`.

    No decoding takes place, so a file in any encoding is text here.
    """

    name: str  # the registered one
    vocab_size = 256
    bytes_per_token = 1.0

    @abstractmethod
    def identity(self) -> Any:
        """JSON that changes whenever the text or its split does, without reading the text."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, in a fixed order. Raises `ConfigError` for one that can't be read."""

    def prepare(self) -> None:
        _, packed = self._prepared
        for split, rows in (("train", self.batch_size), ("val", 1)):
            tokens = packed[split].tokens
            if row_count(tokens, self.seq_len) < rows:
                raise ConfigError(
                    f"data.seq_len: got {self.seq_len}, but {self.name!r} has {tokens} bytes of {split} text, too few "
                    f"for {rows} row(s); give more text, or a smaller seq_len or batch_size"
                )

    @property
    def train(self) -> PackedRows:
        self.prepare()
        folder, _ = self._prepared
        return PackedRows(folder / "train.arrow")

    @property
    def val(self) -> PackedRows:
        self.prepare()
        folder, _ = self._prepared
        return PackedRows(folder / "val.arrow", limit=self.val_rows)

    def check_longer(self, multiple: int) -> None:
        row = multiple * self.seq_len
        require(self.val_tokens >= row, "val_tokens", self.val_tokens, f"at least one row of {row} tokens")

    def prepare_longer(self, longest: int) -> None:
        tokens, row = self._prepared[1]["val"].tokens, longest * self.seq_len
        if row_count(tokens, row) < 1:
            raise ConfigError(
                f"eval.lengths: got {longest}, but {self.name!r} has {tokens} bytes of val text, too few for one row "
                f"of {longest} · data.seq_len = {row}; give more text, or a smaller length"
            )

    def longer_val(self, multiple: int, longest: int) -> PackedRows:
        self.prepare_longer(longest)
        folder, _ = self._prepared
        return PackedRows(folder / "val.arrow", self.val_rows // longest, longest, multiple)

    def stamp(self) -> dict[str, Any]:
        _, packed = self._prepared
        documents = sum(split.documents for split in packed.values())
        return {
            "name": self.name,
            "bytes": sum(split.tokens for split in packed.values()) - documents,  # of text, without separators
            "sha256": hashlib.sha256("".join(packed[split].sha256 for split in SPLITS).encode()).hexdigest(),
            "documents": documents,
            "train_tokens": packed["train"].tokens,
            "val_tokens": packed["val"].tokens,
        }

    @cached_property
    def _prepared(self) -> tuple[Path, dict[str, Packed]]:
        """The cache's folder with `train.arrow` and `val.arrow`, and what they were packed from."""
        folder = prepared(self.name, [LAYOUT, self.name, self.seq_len, self.identity()], self._write)
        packed = json.loads((folder / "packed.json").read_text())
        return folder, {split: Packed(**packed[split]) for split in SPLITS}

    def _write(self, folder: Path) -> None:
        packed = {split: pack(self.documents(split), folder / f"{split}.arrow", self.seq_len) for split in SPLITS}
        (folder / "packed.json").write_text(json.dumps({s: dataclasses.asdict(p) for s, p in packed.items()}))


def file_states(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of each file: together they tell whether its text is still the same."""
    states = ((path, path.stat()) for path in paths)
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]


def read_pieces(path: Path, key: str, start: int = 0, stop: int | None = None) -> Document:
    """Bytes `start` to `stop` of a file. Raises `ConfigError` about `key` when the file can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            left = path.stat().st_size - start if stop is None else stop - start
            while left > 0 and (piece := file.read(min(left, PIECE))):
                left -= len(piece)
                yield piece
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path} ({error.strerror})") from None
