"""What the figures share: colours, which belong to the same point in all of them, and places for names."""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure

from gla_ablate.report.labels import TAG_LABELS, Labels, identity
from gla_ablate.report.points import Point, ranked
from gla_ablate.report.trials import Settings

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933"]
GREY = "#B5B5B5"
HIGHLIGHTED = 6  # of a grid with more points than colours: the best ones, and the best one's baseline
STYLE: Any = {
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a label is one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "lines.solid_capstyle": "round",
    "savefig.dpi": 160,
}


def colours_of(grid: list[Point], settings: Settings) -> dict[str, str]:
    """Point's identity → colour, by place in the grid so that a colour stays when ranks change."""
    shown = [identity(p.values) for p in grid]
    if len(grid) > len(COLOURS):
        best = ranked(grid, settings)
        picked = {identity(p.values) for p in best[:HIGHLIGHTED]}
        if best[0].baseline is not None:
            picked.add(identity(best[0].baseline))
        shown = [key for key in shown if key in picked]
    return {identity(p.values): GREY for p in grid} | dict(zip(shown, COLOURS, strict=False))


def spread(wanted: list[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the given (descending) order, as near to `wanted` as that allows in the mean of
    squares, and within 0…1 if they fit there."""
    clusters: list[list[float]] = []  # [number of members, sum of their wanted tops]
    for place, height in enumerate(wanted):
        clusters.append([1, height + place * gap])
        while len(clusters) > 1 and clusters[-2][1] / clusters[-2][0] < clusters[-1][1] / clusters[-1][0]:
            members, total = clusters.pop()
            clusters[-1][0] += members
            clusters[-1][1] += total
    lowest = (len(wanted) - 1) * gap
    tops = [min(max(total / members, lowest), 1.0) for members, total in clusters for _ in range(int(members))]
    return [top - place * gap for place, top in enumerate(tops)]


def metric_label(settings: Settings) -> str:
    return TAG_LABELS.get(settings.metric, settings.metric)


def shown_range(values: Iterable[float], settings: Settings) -> tuple[float, float]:
    """(low, high) of `values` without those so much worse than the usual that they would hide all other differences:
    further from the best than five times the median is. All of them where nothing else differs by a thousandth."""
    known = sorted(values, reverse=settings.mode == "max")
    best, worst, usual = known[0], known[-1], statistics.median(known)
    far = abs(usual - best) * 5
    if far and abs(worst - best) > far:
        rest = max((v for v in known if abs(v - best) <= far), key=lambda v: abs(v - best))
        worst = rest if abs(rest - best) >= 1e-3 * abs(best) else worst
    return min(best, worst), max(best, worst)


def in_order(levels: list[Any]) -> list[int]:
    """Places of a factor's levels in the order to show them: numbers by size, anything else as the grid has it."""
    places = list(range(len(levels)))
    if all(type(value) in (int, float) and math.isfinite(value) for value in levels):
        places.sort(key=levels.__getitem__)
    return places


def level_text(values: dict[str, Any], labels: Labels) -> str:
    """A level as the table writes it; factors that vary together share a line."""
    return ", ".join(shortened(labels.cell(factor, values)) for factor in values)


def shortened(text: str, most: int = 60) -> str:
    """One line, at most so long; what is cut is told by an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]}…{line[-(most - most // 2 - 1) :]}"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a letter that the font lacks, which is drawn as a box
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()
