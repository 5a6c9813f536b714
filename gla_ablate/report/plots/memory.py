"""What gates have learned: how long each layer and head remembers, a panel for each point."""

from __future__ import annotations

import itertools
import math
import statistics

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gla_ablate.report.findings import Findings
from gla_ablate.report.plots.cost import tick_text
from gla_ablate.report.plots.style import STYLE, png, shortened
from gla_ablate.report.points import Point

PANELS = 12  # of more points, the best
ACROSS = 5  # panels in a row
WIDTH = 25  # characters above a panel
LINES = 4
LEAST = 0.01  # tokens: a gate that lets nothing through has a memory of 0, which has no logarithm
NAMED = 8  # heads: of more, numbers wouldn't fit the cells
BETWEEN = 0.2  # inches from one number of the colour bar to the next, at least


def memory_lengths(found: Findings) -> bytes | None:
    """None where no trial that counts logged one. The best points first."""
    maps = [(point, cells) for point in found.ranked if (cells := by_layer_and_head(point)) is not None][:PANELS]
    if not maps:
        return None
    known = np.concatenate([cells[np.isfinite(cells)] for _, cells in maps])
    low, high = float(known.min()), float(known.max())
    high = high if high > low else 2 * low
    norm = LogNorm(low, high)
    columns = min(ACROSS, len(maps))
    rows = math.ceil(len(maps) / columns)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        tallest = max(cells.shape[0] for _, cells in maps)
        height = rows * (1.1 + 0.3 * min(tallest, 12))
        figure = Figure(figsize=(2.2 * columns + 0.9, height))
        grid = figure.subplots(rows, columns, squeeze=False)
        figure.subplots_adjust(wspace=0.22, hspace=0.7)
        for axes, (point, cells) in zip(grid.flat, maps, strict=False):
            draw(axes, cells, norm)
            axes.set_title(titled(found.labels.point(point.values)), loc="left", fontsize=7)
        for axes in grid.flat[len(maps) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("layer")
        for axes in grid.flat[max(0, len(maps) - columns) : len(maps)]:
            axes.set_xlabel("head")
        colours = matplotlib.cm.ScalarMappable(norm, "viridis")
        bar = figure.colorbar(colours, ax=list(grid.flat), shrink=0.8, pad=0.02, aspect=30)
        marks = round_numbers(low, high, BETWEEN / (0.6 * height))  # the bar has 0.6 of the height
        bar.set_ticks(marks, labels=[tick_text(mark) for mark in marks])
        bar.minorticks_off()  # matplotlib writes beside those, in TeX, where memories span a decade or less
        bar.set_label("memory length (tokens)")
        bar.outline.set_visible(False)
        return png(figure)


def by_layer_and_head(point: Point) -> np.ndarray | None:
    """[layers, heads], the geometric mean over seeds; NaN for a layer without a gate. None without any."""
    known = [trial.memory for trial in point.trials if trial.counts and trial.memory]
    places = set.intersection(*map(set, known)) if known else set()
    if not places:
        return None
    shape = (max(layer for layer, _ in places) + 1, max(head for _, head in places) + 1)
    cells = np.full(shape, math.nan)
    for place in places:
        cells[place] = statistics.geometric_mean(max(memory[place], LEAST) for memory in known)
    return cells


def round_numbers(low: float, high: float, apart: float) -> list[float]:
    """Numbers to mark from `low` to `high` on a logarithmic scale, at least `apart` of its length between two: 1, 2, 5,
    10, 20, … or fewer of those; evenly spaced ones where less than two of them lie there; or else the ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [[digit * 10.0**p for p in powers for digit in digits] for digits in ((1, 2, 5), (1, 3))]
    found += [[10.0**p for p in powers if p % step == 0] for step in range(1, len(powers))]
    found += [[*map(float, MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(low, high))] for bins in range(5, 0, -1)]
    for marks in found:
        marks = [mark for mark in marks if low <= mark <= high]
        if len(marks) >= 2 and all(b >= a * (high / low) ** apart for a, b in itertools.pairwise(marks)):
            return marks
    return [low, high]


def titled(name: str) -> str:
    """A point's name above its panel: as many factors a line as fit, at most four lines."""
    lines = [""]
    for part in name.split(" · "):
        joined = f"{lines[-1]} · {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= WIDTH else [*lines, part]
    return "\n".join(shortened(line, WIDTH) for line in [line for line in lines if line][:LINES])


def draw(axes: Axes, cells: np.ndarray, norm: LogNorm) -> None:
    axes.imshow(np.ma.masked_invalid(cells), cmap="viridis", norm=norm, aspect="auto")
    layers, heads = cells.shape
    if heads <= NAMED:
        for (layer, head), value in np.ndenumerate(cells):
            if math.isfinite(value):
                ink = "white" if norm(value) < 0.6 else "black"
                text = f"{value:.0f}" if value >= 9.5 else f"{value:.2g}"
                axes.text(head, layer, text, ha="center", va="center_baseline", fontsize=7, color=ink)
    axes.set_xticks(range(heads) if heads <= NAMED else [0, heads - 1])
    axes.set_yticks(range(layers) if layers <= 2 * NAMED else [0, layers - 1])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
