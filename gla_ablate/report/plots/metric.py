"""The metric of every grid point, with its seeds."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from gla_ablate.report.findings import Findings
from gla_ablate.report.labels import identity
from gla_ablate.report.plots.style import STYLE, colours_of, metric_label, png, shortened, shown_range

ROWS = 60  # a page's worth


def metric_by_point(found: Findings) -> bytes | None:
    """A row per grid point, best on top: each seed a tick, their mean a disc, its std a bar; None below two rows.

    A large grid shows its best points, and says so. A triangle at the edge is a mean much worse than the axis shows.
    """
    grid, settings = found.shown, found.experiment.settings
    known = [(p, p.mean) for p in found.ranked if p.mean is not None]
    if len(known) < 2:
        return None
    rows = known[:ROWS]
    colours = colours_of(grid, settings)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.8, 0.25 * len(rows)))
        axes = figure.add_axes((0, 0, 1, 1))  # labels stand outside of it; `png` makes room for them
        low, high = shown_range([mean for _, mean in rows], settings)
        shown = [(p, mean) for p, mean in rows if low <= mean <= high]
        ends = [mean + sign * (p.std or 0.0) for p, mean in shown for sign in (-1, 1)]
        ends += [value for p, _ in shown for value in p.by_seed.values()]
        low, high = min(ends), max(ends)
        for y, (point, mean) in enumerate(rows):
            colour = colours[identity(point.values)]
            if point.std is not None:
                axes.plot([mean - point.std, mean + point.std], [y, y], color=colour, lw=4, alpha=0.35)
                axes.plot(list(point.by_seed.values()), [y] * point.n, "|", color=colour, ms=10, mew=1.2)
            place = min(max(mean, low), high)
            marker = "o" if place == mean else (">" if place < mean else "<")
            axes.plot(place, y, marker, color=colour, ms=5, mec="white", mew=0.7, clip_on=False)
            text = f"{mean:.{found.places}f}"
            text += "" if point.std is None else f" ± {point.std:.{found.places}f}"
            beside: Any = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0), "textcoords": "offset points"}
            axes.annotate(text, (1, y), va="center_baseline", **beside)
        axes.set_yticks(range(len(rows)), [shortened(found.labels.point(p.values)) for p, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        margin = 0.06 * ((high - low) or abs(low) or 1.0)
        axes.set_xlim(low - margin, high + margin)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(metric_label(settings))
        if len(rows) < len(known):
            axes.set_title(f"the best {len(rows)} of {len(known)} points", loc="left", fontsize=9)
        return png(figure)
