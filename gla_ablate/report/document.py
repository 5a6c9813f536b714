"""A report as blocks, before it is Markdown or HTML. Text is plain: each writer escapes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Column(NamedTuple):
    """A column of text. A terminal that is too narrow drops columns with `spare` > 0, lowest first."""

    header: str
    cells: list[str]
    right: bool = False
    spare: int = 0


@dataclass(frozen=True)
class Mono:
    """Words in a paragraph that are code."""

    text: str


@dataclass(frozen=True)
class Link:
    """To a file beside the report."""

    name: str


Words = tuple[str | Mono | Link, ...]


@dataclass(frozen=True)
class Heading:
    text: str
    level: int  # 1: the title


@dataclass(frozen=True)
class Paragraph:
    words: Words
    role: str = ""  # question | answer | note; of a check: passed | failed | open


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Table:
    columns: list[Column]


@dataclass(frozen=True)
class Image:
    """A PNG that lies beside the report under `name`."""

    name: str
    content: bytes
    caption: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, which stand in bytes 16 to 23."""
        return int.from_bytes(self.content[16:20]), int.from_bytes(self.content[20:24])


@dataclass(frozen=True)
class Shell:
    """A command line."""

    text: str


PLOTS = Heading("Plots", 2)  # before a report's images
Block = Heading | Paragraph | Bullets | Table | Image | Shell


def text(*words: str | Mono | Link) -> Paragraph:
    return Paragraph(words)
