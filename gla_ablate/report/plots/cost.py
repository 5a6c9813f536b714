"""What the metric costs: against state size, parameters and speed, in panels that share the metric's axis."""

from __future__ import annotations

import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gla_ablate.report.findings import Findings
from gla_ablate.report.labels import Labels, identity, si
from gla_ablate.report.plots.style import GREY, STYLE, colours_of, metric_label, png, shortened, shown_range, spread
from gla_ablate.report.points import Point
from gla_ablate.report.trials import Settings

COSTS = {  # what a point has of it → (its name, whether less is better)
    "state_size": ("state size (numbers)  ← less is better", True),
    "params": ("parameters  ← less is better", True),
    "tokens_per_s": ("tokens/s in training  more is better →", False),
}
LOG_FROM = 3.0  # an axis that spans more than this factor is logarithmic


def cost(found: Findings) -> bytes | None:
    """A panel for each cost in which the points differ; None without one. A point stands at the same height in all of
    them, where its name is; the thin line joins those that no other point beats in both."""
    grid, labels, settings = found.shown, found.labels, found.experiment.settings
    known = [point for point in grid if point.mean is not None]
    panels = {key: about for key, about in COSTS.items() if len({getattr(p, key) for p in known} - {None}) > 1}
    if not panels:
        return None
    colours = colours_of(grid, settings)
    limits = limits_of(known, colours, settings)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(panels), 3.3))
        figure.subplots_adjust(wspace=0.1)
        row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (key, (name, less)) in zip(row, panels.items(), strict=True):
            points = [point for point in known if getattr(point, key) is not None]
            sizes = [float(getattr(point, key)) for point in points]
            draw_front(axes, points, sizes, less, settings)
            for point, size in sorted(zip(points, sizes, strict=True), key=lambda p: colour_of(p[0], colours) != GREY):
                draw(axes, point, size, colour_of(point, colours), limits)
            scale(axes, sizes)
            axes.set_xlabel(name)
            axes.set_ylim(*limits)
        better = "↓" if settings.mode == "min" else "↑"
        row[0].set_ylabel(f"{metric_label(settings)}  {better} better")
        name_points(row[-1], known, labels, colours)
        return png(figure)


def colour_of(point: Point, colours: dict[str, str]) -> str:
    return colours[identity(point.values)]


def limits_of(points: list[Point], colours: dict[str, str], settings: Settings) -> tuple[float, float]:
    """Of the metric's axis: over the means, and the bars as far as they don't take more room than the means."""
    low, high = shown_range([point.mean for point in points if point.mean is not None], settings)
    room = (high - low) or 0.01 * abs(low) or 1.0
    shown = [p for p in points if p.mean is not None and low <= p.mean <= high and colour_of(p, colours) != GREY]
    ends = [(p.mean or 0.0) + sign * (p.std or 0.0) for p in shown for sign in (-1, 1)]
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    margin = 0.06 * ((high - low) or room)
    return low - margin, high + margin


def draw(axes: Axes, point: Point, size: float, colour: str, limits: tuple[float, float]) -> None:
    """A disc with a bar of ± one std; at the edge, a triangle for a mean beyond it."""
    assert point.mean is not None
    y = float(np.clip(point.mean, *limits))
    background = colour == GREY
    if point.std is not None and not background:
        axes.plot([size, size], [point.mean - point.std, point.mean + point.std], color=colour, lw=2.5, alpha=0.35)
    marker = "o" if y == point.mean else ("^" if y < point.mean else "v")
    size_of_it = 4 if background and marker == "o" else 6
    axes.plot(size, y, marker, color=colour, ms=size_of_it, mec="white", mew=0.6, clip_on=False)


def draw_front(axes: Axes, points: list[Point], sizes: list[float], less: bool, settings: Settings) -> None:
    """Steps along the points that no other beats in both, the cheapest first."""
    sign = 1 if settings.mode == "min" else -1
    front: list[tuple[float, float]] = []
    for size, mean in sorted(
        ((s, p.mean) for s, p in zip(sizes, points, strict=True) if p.mean is not None),
        key=lambda point: (point[0] if less else -point[0], sign * point[1]),
    ):
        if not front or sign * mean < sign * front[-1][1]:
            front.append((size, mean))
    x, y = np.array(front).T
    axes.plot(x, y, drawstyle="steps-post", color="#8A8A8A", lw=0.8, zorder=1)


def scale(axes: Axes, sizes: list[float]) -> None:
    """The axis of a cost: logarithmic where it spans much; ticks at the sizes themselves where they are few."""
    low, high = min(sizes), max(sizes)
    log = low > 0 and high / low > LOG_FROM
    if log:
        axes.set_xscale("log")
    distinct = np.array(sorted(set(sizes)))
    gaps = np.diff(np.log(distinct) if log else distinct)
    if len(distinct) <= 4 and gaps.min() > 0.25 * gaps.sum():
        axes.xaxis.set_major_locator(FixedLocator(distinct.tolist()))
    elif log:
        subs: Any = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: tick_text(size)))
    axes.margins(x=0.1)


def tick_text(size: float) -> str:
    """`4,096` or `1.5M`: as `si`, but whole up to 100,000, and without zeros at the end of a fraction."""
    if size == round(size) and abs(size) < 1e5:
        return f"{size:,.0f}"
    return re.sub(r"\.?0+(?=[kMGTP]?$)", "", text) if "." in (text := si(size, 4)) else text


def name_points(axes: Axes, points: list[Point], labels: Labels, colours: dict[str, str]) -> None:
    """The names of the coloured points right of `axes`, at their heights or as near as the others leave room; the grey
    ones share a name at the bottom."""
    low, high = axes.get_ylim()
    named = [
        (float(np.clip(((p.mean or 0.0) - low) / (high - low), 0, 1)), shortened(labels.point(p.values)), colour)
        for p in points
        if (colour := colour_of(p, colours)) != GREY
    ]
    named.sort(key=lambda name: -name[0])
    others = len(points) - len(named)
    beside: Any = {"transform": axes.transAxes, "clip_on": False}
    wanted = [height for height, *_ in named] + [0.0] * bool(others)
    texts = [*named, (0.0, f"{others} others", GREY)] if others else named
    for (height, text, colour), place in zip(texts, spread(wanted, gap=0.058), strict=True):
        if colour != GREY:
            axes.plot([1.01, 1.06], [height, place], color=colour, lw=0.6, alpha=0.7, **beside)
        axes.plot(1.085, place, "o", color=colour, ms=5, **beside)
        axes.text(1.12, place, text, va="center_baseline", fontsize=8.5, **beside)
