"""Figures from what `op.py` or `decoding.py` recorded; also by itself, for a run killed before it drew or one without
matplotlib.

    python benchmarks/plot.py op.json [sweep.json ...] op.png

Rows of several files are drawn together, from the last one where they overlap; `--forms` makes a figure of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rivals import OURS
from shapes import KINDS, SHAPES, TOKENS

from gla_ablate.report.plots.style import COLOURS, STYLE, png, spread

Curves = dict[str, dict[int, float]]  # name → value by T
LINES = {(OURS, "channel"): OURS, ("fla", "channel"): "FLA chunk_gla"} | {
    ("flash", "softmax"): "softmax, FlashAttention",
    ("cudnn", "softmax"): "softmax, cuDNN",
}
MARKS = "osD^vPX"


def draw(record: dict[str, Any]) -> bytes:
    """A PNG of the forms, of decoding, or of time against T and of the share of the floor, whichever the rows have."""
    rows = [row for row in record["rows"] if not row.get("note")]
    if record.get("decoding"):
        panels = decoding_panels(rows)
    elif record["forms"]:
        panels = forms_panels(rows, record["size"])
    else:
        panels = [panel for panel in (sweep_panel(rows), floor_panel(rows)) if panel]
    if not panels:
        raise ValueError("plot: no row has a speed to draw")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(panels), 3.6))
        figure.subplots_adjust(wspace=0.95)
        for axes, (fill, *given) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            fill(axes, *given)
        return png(figure)


def write(record: dict[str, Any], path: Path) -> None:
    """`draw` to `path`, or say what there isn't to draw."""
    try:
        path.write_bytes(draw(record))
    except ValueError as error:
        print(error)


def forms_panels(rows: list[dict[str, Any]], size: dict[str, int]) -> list[tuple]:
    panels = []
    for key, label in (("ms", "forward, ms"), ("peak_mib", "peak memory beyond the inputs, MiB")):
        curves: Curves = {}
        for row in rows:
            if row[key]:  # a CPU's memory isn't counted
                curves.setdefault(row["form"], {})[row["T"]] = row[key]
        if curves:
            panels.append((draw_lines, curves, label, ", ".join(f"{name} {n}" for name, n in size.items())))
    return panels


def decoding_panels(rows: list[dict[str, Any]]) -> list[tuple]:
    """What a token costs against how many came before: on the device alone, where a step could be captured."""
    panels = []
    for keys, label in ((("replay_ms", "ms"), "ms a token"), (("cache_mib",), "carried from token to token, MiB")):
        curves: Curves = {}
        for row in rows:
            value = next(row[key] for key in keys if row[key])
            curves.setdefault(f"{row['mixer']}, batch {row['batch']}", {})[row["context"]] = value
        if curves:
            panels.append((draw_lines, curves, label, "a token after T others"))
    return panels


def device_ms(row: dict[str, Any]) -> float:
    """Forward + backward on the device alone, where the op could be captured."""
    return row["replay_ms"] or row["both_ms"]


def sweep_panel(rows: list[dict[str, Any]]) -> tuple | None:
    """Forward and backward at the width of the 1.3B model on batches of `TOKENS` tokens, from two lengths on."""
    curves: Curves = {}
    for row in rows:
        shape, name = row["shape"], LINES.get((row["op"], row["kind"]))
        like = shape["H"] * shape["V"] == 2048 and shape["B"] * shape["T"] == TOKENS
        if name and like and row["strength"] == "usual" and (row["kind"] == "softmax" or shape["K"] == 256):
            curves.setdefault(name, {})[shape["T"]] = device_ms(row)
    if max(map(len, curves.values()), default=0) < 2:
        return None
    ordered = {name: curves[name] for name in LINES.values() if name in curves}
    return draw_lines, ordered, "forward + backward, ms", f"{TOKENS:,} tokens a batch, hidden width 2048"


def floor_panel(rows: list[dict[str, Any]]) -> tuple | None:
    """Shares in per cent by (op, shape, kind)."""
    shares = {
        (row["op"], row["shape"]["name"], row["kind"]): 100 * row["floor_both_ms"] / device_ms(row)
        for row in rows
        if row["shape"]["name"] in SHAPES and row["kind"] in KINDS
    }
    return (draw_bars, shares) if shares else None


def draw_lines(axes: Axes, curves: Curves, label: str, title: str) -> None:
    """Log-log against T. Lines that reach the longest T are named beside the panel, others where they end, those that
    end together one above the other."""
    for curve, colour, mark in zip(curves.values(), COLOURS, MARKS, strict=False):
        axes.plot(sorted(curve), [curve[T] for T in sorted(curve)], color=colour, marker=mark, ms=3.5, lw=1.5)
    ticks = sorted({T for curve in curves.values() for T in curve})
    axes.set(xlabel="sequence length T, tokens", ylabel=label, yscale="log")
    axes.set_xscale("log", base=2)
    names = [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in ticks]
    every = 1 if len(ticks) < 8 else 2  # one is named, so that names don't overlap: the last, and back from there
    axes.set_xticks(ticks, [name if i % every == 0 else "" for i, name in enumerate(names, start=1 - len(names))])
    low, high = axes.get_ylim()
    if high / low < 10:  # what hardly varies shall look so
        middle = (low * high) ** 0.5
        low, high = axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 300 else (1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, loc="left", fontsize=9)
    ends: dict[int, list[tuple]] = {}  # T → height 0…1, point, name, colour
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        end = max(curve)
        place = (axes.transData + axes.transAxes.inverted()).transform((end, curve[end]))
        ends.setdefault(end, []).append((place[1], (end, curve[end]), place[0], name, colour))
    leader = {"arrowstyle": "-", "lw": 0.6, "shrinkA": 1, "shrinkB": 4}
    for end, named in ends.items():
        named.sort(reverse=True)
        for (_, point, across, name, colour), place in zip(
            named, spread([height for height, *_ in named], gap=0.065), strict=True
        ):
            beside = {"textcoords": "axes fraction", "va": "center", "fontsize": 8.5, "color": colour}
            at = 1.04 if end == ticks[-1] else across + 0.04
            axes.annotate(name, point, (at, place), arrowprops=leader | {"color": colour}, **beside)


def draw_bars(axes: Axes, shares: dict[tuple[str, str, str], float]) -> None:
    """A bar for each shape and kind of gate, and a tick where FLA stands."""
    names = [name for name in SHAPES if any(name == shape for _, shape, _ in shares)]
    kinds = [kind for kind in KINDS if any(kind == other for *_, other in shares)]
    height = 0.84 / len(kinds)
    ticks = []
    for i, kind in enumerate(kinds):
        places = [row + (i - (len(kinds) - 1) / 2) * height for row in range(len(names))]
        bars = [shares.get((OURS, name, kind), 0.0) for name in names]
        axes.barh(places, bars, 0.86 * height, color=COLOURS[KINDS.index(kind)], label=kind)
        ticks += [(shares["fla", n, kind], y) for n, y in zip(names, places, strict=True) if ("fla", n, kind) in shares]
    if ticks:
        axes.plot(*zip(*ticks, strict=True), "|", color="black", ms=18 * height, mew=1.6, label="FLA")
    axes.set(xlabel="share of the floor, forward + backward, %", xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    handles = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99), "ncols": 5, "frameon": False}
    axes.legend(fontsize=8, handlelength=1, columnspacing=1, **handles)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    *sources, target = map(Path, sys.argv[1:])
    records = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    rows = [row for record in records for row in record["rows"]]
    target.write_bytes(draw({**records[0], "rows": rows}))


if __name__ == "__main__":
    main()
