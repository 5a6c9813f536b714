"""A document as Markdown."""

from __future__ import annotations

import re
from pathlib import Path

from gla_ablate.report.document import (
    Block,
    Bullets,
    Column,
    Heading,
    Image,
    Link,
    Mono,
    Paragraph,
    Shell,
    Table,
    Words,
)


def markdown(document: list[Block]) -> str:
    return "\n\n".join(map(block, document)) + "\n"


def block(item: Block) -> str:
    match item:
        case Heading(text, level):
            return f"{'#' * level} {escape(text)}"
        case Paragraph(words, "question"):
            return f"**{inline(words)}**"
        case Paragraph(words, "passed" | "failed" | "open"):
            return f"> **{inline(words)}**"
        case Paragraph(words, "note"):
            return f"> **Note.** {inline(words)}"
        case Paragraph(words):
            return inline(words)
        case Bullets(items):
            return "\n".join(f"- {escape(item)}" for item in items)
        case Table(columns):
            return pipes(columns)
        case Image(name, _, caption):
            return f"![{Path(name).stem}]({name})\n\n*{escape(caption)}*"
        case Shell(text):
            fence = "`" * max(3, 1 + longest(text))
            return f"{fence}sh\n{text}\n{fence}"


def longest(text: str) -> int:
    """The length of the longest run of backticks, which a fence around them has to surpass."""
    return max(map(len, re.findall("`+", text)), default=0)


def inline(words: Words) -> str:
    written = []
    for word in words:
        match word:
            case Mono(text):
                fence, space = "`" * (1 + longest(text)), " " * ("`" in text)
                written.append(f"{fence}{space}{text}{space}{fence}")
            case Link(name):
                written.append(f"[{name}]({name})")
            case str():
                written.append(escape(word))
    return "".join(written)


def pipes(columns: list[Column]) -> str:
    """A Markdown table whose source lines up too."""
    padded = []
    for column in columns:
        cells = [escape(cell) for cell in (column.header, *column.cells)]
        width = max(3, *map(len, cells))
        rule = "-" * (width - 1) + ":" if column.right else "-" * width
        padded.append([c.rjust(width) if column.right else c.ljust(width) for c in (cells[0], rule, *cells[1:])])
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*padded, strict=True))


def escape(text: str) -> str:
    """Text that Markdown shows as it is, GitHub's with its formulas and crossed-out words too, on one line."""
    special = r"[\\|*`<\[~$]|&(?=#?\w+;)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    return re.sub(special, r"\\\g<0>", " ".join(text.splitlines()))
