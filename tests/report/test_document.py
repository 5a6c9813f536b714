"""One document, two writers: nothing lost, nothing taken for markup, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from gla_ablate.report import write_report
from gla_ablate.report.document import Bullets, Column, Heading, Image, Link, Mono, Paragraph, Shell, Table, text
from gla_ablate.report.html import html, number_of
from gla_ablate.report.markdown import markdown

EVIL = "<script>alert('x')</script> & \"q\" | *b* `c` __d__ [e](f)"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8) + (320).to_bytes(4) + bytes(8)
EVERY = [
    Heading(EVIL, 1),
    Paragraph(("Which ", Mono("val/loss"), EVIL), "question"),
    Paragraph((EVIL,), "answer"),
    Paragraph((EVIL,), "note"),
    text("See ", Link("results.csv"), EVIL),
    Bullets([EVIL, EVIL]),
    Table([Column(EVIL, [EVIL, "1"]), Column("n", ["1", "2"], right=True)]),
    Image("curves.png", PNG, EVIL),
    Shell(f"python run.py '{EVIL}'"),
]


class Page(HTMLParser):
    """Text, tags and attributes of a page whose tags are closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src", "srcset", "data", "action")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)


def test_the_page_shows_what_is_given_and_takes_none_of_it_for_markup():
    content = html(EVIL, EVERY)
    page = Page(content)
    assert "".join(page.texts).count(EVIL) == 12  # the title, and every place above
    assert (
        page.tags.count("script") == 1
        and "alert" not in re.findall("<script>(.*?)</script>", html(EVIL, EVERY), re.DOTALL)[0]
    )


def test_the_page_fetches_nothing_and_runs_its_own_script_alone():
    content = html("t", EVERY)
    assert set(Page(content).links) == {"results.csv", f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", content.replace(EVIL, ""))
    (script,) = re.findall("<script>(.*?)</script>", content, re.DOTALL)
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{checksum}'" in content


def test_the_page_has_both_colour_schemes_and_fits_a_phone():
    content = html("t", [])
    assert "prefers-color-scheme: dark" in content and "width=device-width" in content


def test_an_image_is_as_large_as_it_was_drawn():
    assert 'width="192"' in html("t", EVERY)  # 320 pixels at 160 to the inch are 2 inches, of 96 CSS pixels each


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.9834 ± 0.0121", 1.9834),
        ("−0.25", -0.25),
        ("+0.25", 0.25),
        ("tie −0.562", -0.562),
        ("−0.467 … −0.461", -0.467),
        ("8,192", 8192.0),
        ("474.0k", 474_000.0),
        ("2.82M", 2_820_000.0),
        ("1e-05", 1e-5),
        ("2/3", 2.0),
        ("0", 0.0),
        *(
            (words, None)
            for words in ("1 failed", "2 out of memory, 1 queued", "baseline", "largest tried", "", "auto")
        ),
        *((words, None) for words in ("1 a", "1,2", "a.txt", "2nd", "nan", "1e999", "3-4", "tie")),
    ],
)
def test_a_cell_is_sorted_by_its_number_if_it_is_one(text, number):
    assert number_of(text) == number
    written = html("t", [Table([Column("x", [text])])])
    assert ("data-number" in re.findall("<td[^>]*>", written)[0]) == (number is not None)


def test_markdown_escapes_text_and_leaves_a_command_as_it_is():
    written = markdown(EVERY)
    escaped = r"""\<script>alert('x')\</script> & "q" \| \*b\* \`c\` \_\_d\_\_ \[e](f)"""
    assert written.count(escaped) == 10  # all but the command
    assert f"```sh\npython run.py '{EVIL}'\n```" in written
    assert "[results.csv](results.csv)" in written and "![curves](curves.png)" in written


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("$a$ ~~b~~", r"\$a\$ \~\~b\~\~"),
        ("&lt; &#60; a & b; c", r"\&lt; \&#60; a & b; c"),
        ("a\nb", "a b"),
    ],
)
def test_what_githubs_markdown_would_change_is_escaped(text, written):
    assert markdown([Paragraph((text,))]) == f"{written}\n"


def test_backticks_end_no_code():
    assert (
        markdown([Paragraph((Mono("gate/`x`"),)), Shell("echo '```'")])
        == "`` gate/`x` ``\n\n````sh\necho '```'\n````\n"
    )


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_both_reports_hold_every_part(folder, name):
    for heads, seed in ((h, s) for h in (1, 2, 4) for s in (0, 1)):
        folder.add({"model.heads": heads}, seed, {"train/loss": [3.0, 2.0], "val/loss": [3.0, heads + seed / 8]})
    folder.add({"model.heads": 8}, 0, status="failed", reason="<b>boom</b>")
    path = folder.save({"baseline": {"model.heads": 1}}, command="python run.py experiments/heads.yaml")
    write_report(path)
    content = (path / "report" / name).read_text()
    parts = ["Results", "What each factor does", "Which points differ", "All pairs", "Against the best, heads=1"]
    parts += ["Plots", "Trials that don", "How the trials ran", "Reproduce", "python run.py experiments/heads.yaml"]
    places = [content.index(part) for part in parts]
    assert places == sorted(places)
    assert "Best: heads=1, 1.062 ± 0.088 over 2 seeds" in content
    assert all(file in content for file in ("results.csv", "trials.csv", "effects.csv", "pairs.csv"))
    if name == "report.html":
        images = [base64.b64encode((path / "report" / n).read_bytes()).decode() for n in ("curves.png", "metric.png")]
        assert all(image in content for image in images)
        assert "<b>" not in content
        Page(content)
