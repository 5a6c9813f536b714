"""A document as one HTML file that opens anywhere: images inside, no resource from outside, no script needed.

The only script sorts a table by the header that is clicked. A policy in the page allows that one, by its checksum, and
nothing from the network, whatever a trial's name holds.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html import escape
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
from gla_ablate.report.plots import style

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c6470; --line: #d9dde2; --tint: #f4f6f8; --link: #0b5cad;
        --page: #fff; --note: #fff6dd; --edge: #e0b84c }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --soft: #9aa3af; --line: #363c45; --tint: #1f242b; --link: #7ab7f5;
          --page: #14171b; --note: #332b14; --edge: #8f7426 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; color: var(--text); background: var(--page);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { margin: 0; font-size: 1.1rem; font-weight: 600; color: var(--soft) }
h2 { margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.25rem }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem }
p, ul { max-width: 48rem }
.question { margin: .25rem 0 .5rem; font-size: 1.6rem; line-height: 1.25; font-weight: 650 }
.answer { font-size: 1.1rem }
.note, .passed, .failed, .open { padding: .6rem .9rem; border-left: 4px solid var(--edge); background: var(--note) }
.passed { border-color: #2e8540; background: none }
.failed { border-color: #c5221f; font-weight: 650 }
ul { padding-left: 1.2rem; color: var(--soft); font-size: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
td { max-width: 28rem; overflow-wrap: anywhere }
td.long { white-space: normal; min-width: 12rem }
th { color: var(--soft); font-weight: 600 }
.right { text-align: right }
tbody tr:hover { background: var(--tint) }
th[data-sorts] { cursor: pointer }
th[aria-sort=ascending]::after { content: " ▴" }
th[aria-sort=descending]::after { content: " ▾" }
figure { margin: 1rem 0 }
img { display: block; max-width: max(100%, 34rem); height: auto; padding: .5rem; border: 1px solid var(--line);
      border-radius: 6px; background: #fff }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .9rem }
code, pre { font: .9em ui-monospace, monospace }
pre { padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; background: var(--tint) }
a { color: var(--link) }
@media print { .scroll { overflow: visible } h2 { break-after: avoid } figure { break-inside: avoid } }
"""

SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  head.dataset.sorts = "";
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const kind = cell => cell.dataset.number ? 0 : cell.textContent ? 1 : 2;  // numbers, words, nothing: either way
    const order = (a, b) => kind(a) - kind(b) || down * (
      kind(a) ? a.textContent.localeCompare(b.textContent) : a.dataset.number - b.dataset.number);
    body.append(...[...body.rows].sort((a, b) => order(a.cells[head.cellIndex], b.cells[head.cellIndex])));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
  });
}
"""

LONG = 60  # characters from which a cell may break its line


def html(title: str, document: list[Block]) -> str:
    body = "\n".join(map(block, document))
    checksum = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{checksum}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def block(item: Block) -> str:
    match item:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(words, "note"):
            return f'<p class="note"><strong>Note.</strong> {inline(words)}</p>'
        case Paragraph(words, ""):
            return f"<p>{inline(words)}</p>"
        case Paragraph(words, role):
            return f'<p class="{role}">{inline(words)}</p>'
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"
        case Table(columns):
            return table(columns)
        case Image(name, content, caption) as image:
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            shown = f'<img src="{source}" alt="{escape(Path(name).stem)}" width="{width(image)}">'
            return f'<figure><div class="scroll">{shown}</div><figcaption>{escape(caption)}</figcaption></figure>'
        case Shell(text):
            return f"<pre>{escape(text)}</pre>"


def width(image: Image) -> int:
    """At the size that it was drawn for, in CSS pixels."""
    return round(image.size[0] * 96 / style.STYLE["savefig.dpi"])


def inline(words: Words) -> str:
    written = []
    for word in words:
        match word:
            case Mono(text):
                written.append(f"<code>{escape(text)}</code>")
            case Link(name):
                written.append(f'<a href="{escape(name)}">{escape(name)}</a>')
            case str():
                written.append(escape(word))
    return "".join(written)


def table(columns: list[Column]) -> str:
    heads = "".join(cell("th", column.header, column.right) for column in columns)
    cells = [[cell("td", text, column.right) for text in column.cells] for column in columns]
    rows = "\n".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    return f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def cell(tag: str, text: str, right: bool) -> str:
    kinds = [kind for kind, is_one in (("right", right), ("long", len(text) > LONG)) if is_one]
    about = f' class="{" ".join(kinds)}"' if kinds else ""
    number = number_of(text) if tag == "td" else None
    about += "" if number is None else f' data-number="{number!r}"'
    return f"<{tag}{about}>{escape(text)}</{tag}>"


NUMBER = re.compile(
    r"(?:tie )?(?P<sign>[-+−]?)(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?)(?P<unit>[kMGTP]?)"
    r"(?: ± .*| … .*|/\d+)?"
)
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def number_of(text: str) -> float | None:
    """What a cell is sorted by: `−1.50`, `2.5 ± 0.1`, `tie +0.1`, `468k`, an interval's lower end, `2` of `2/3`; None
    for one that is no number, such as `1 failed`."""
    found = NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    size = float(found["digits"].replace(",", "")) * UNITS[found["unit"]]
    return None if math.isinf(size) else -size if found["sign"] in ("-", "−") else size
