"""Documents → rows of bytes in a memory-mapped Arrow file.

A separator byte follows each document, and the stream is cut into rows of seq_len + 1 that overlap by one: row i holds
bytes i · seq_len … (i + 1) · seq_len of the stream, so that every byte but the first is a target exactly once.

    documents "abc", "de", seq_len 2 → stream a b c ␀ d e ␀ → rows [a b c] [c ␀ d] [d e ␀]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gla_ablate.data.source import Rows

SEPARATOR = b"\0"
BLOCK = 1 << 22  # bytes held in memory at a time, and per record batch of the file


@dataclass(frozen=True)
class Packed:
    """What `pack` read: documents that weren't empty, and the length and hash of the stream, separators included."""

    documents: int
    tokens: int
    sha256: str


def pack(documents: Iterable[Iterable[bytes]], path: Path, seq_len: int) -> Packed:
    """Write `documents`, each an iterable of pieces, to `path` as uint8 rows [seq_len + 1] in column `tokens`.

    Memory stays at about two blocks whatever the size of a document. NUL bytes inside a document are dropped, they
    would read as separators; a document that is empty then leaves no trace. Bytes after the last whole row are in the
    hash but in no row.
    """
    import pyarrow as pa

    schema = pa.schema({"tokens": pa.list_(pa.uint8(), seq_len + 1)})
    count = tokens = 0
    digest = hashlib.sha256()
    held = bytearray()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:

        def flush() -> None:
            rows = (len(held) - 1) // seq_len
            if rows > 0:
                window = np.lib.stride_tricks.sliding_window_view(np.frombuffer(bytes(held), np.uint8), seq_len + 1)
                flat = window[: rows * seq_len : seq_len].reshape(-1)  # [rows · (seq_len + 1)]
                column = pa.FixedSizeListArray.from_arrays(pa.array(flat), seq_len + 1)
                writer.write_batch(pa.record_batch([column], schema=schema))
                del held[: rows * seq_len]

        for piece in joined(documents):
            digest.update(piece)
            count += piece == SEPARATOR
            tokens += len(piece)
            held += piece
            if len(held) >= BLOCK:
                flush()
        flush()
    return Packed(count, tokens, digest.hexdigest())


def joined(documents: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """The stream in pieces: those of each document without NUL bytes, then `SEPARATOR` as a piece of its own."""
    for document in documents:
        empty = True
        for piece in document:
            if text := piece.replace(SEPARATOR, b""):
                empty = False
                yield text
        if not empty:
            yield SEPARATOR


def row_count(tokens: int, seq_len: int) -> int:
    """Rows that `pack` cuts from a stream of `tokens`."""
    return max(0, (tokens - 1) // seq_len)


class PackedRows(Rows):
    """The rows of a file that `pack` wrote, or `limit` of them evenly spaced over it.

    With `span`, of `limit` spans of so many rows, each cut into longer rows of `join` neighbours, which are those that
    `pack` would make of seq_len · join: all `join` that divide `span` give the same tokens, by other contexts.
    """

    def __init__(self, path: Path, limit: int | None = None, span: int = 1, join: int = 1) -> None:
        import datasets

        self._table = datasets.Dataset.from_file(str(path)).with_format("numpy")
        self._span, self._join = span, join
        self._all = len(self._table) // span  # spans that there are
        self._spans = self._all if limit is None else min(limit, self._all)

    def __len__(self) -> int:
        return self._spans * (self._span // self._join)

    def __getitem__(self, rows: int | list[int]) -> dict[str, Tensor]:
        spans, place = np.divmod(np.asarray(rows), self._span // self._join)
        first = spans * self._all // self._spans * self._span + place * self._join
        parts = first[..., None] + np.arange(self._join)  # [..., join]
        tokens = self._table[parts.ravel().tolist()]["tokens"].astype(np.int64)  # [rows · join, seq_len + 1]

        def joined(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x).reshape(*first.shape, -1))  # [..., join · seq_len]

        return {"inputs": joined(tokens[:, :-1]), "targets": joined(tokens[:, 1:])}


def hashed_to_validation(name: str, fraction: float) -> bool:
    """Whether the document called `name` is for validation: a fixed choice, true for about `fraction` of all names."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]) < fraction * 2**64
