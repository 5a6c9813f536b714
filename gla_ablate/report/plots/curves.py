"""Curves with a band over seeds: a panel a tag, a line a grid point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gla_ablate.report.findings import Findings
from gla_ablate.report.labels import TAG_LABELS, Labels, identity
from gla_ablate.report.plots.style import GREY, STYLE, colours_of, png, shortened, spread
from gla_ablate.report.points import Point

SOLID, DASHED = "-", (0, (3, 1.5))
BINS = 200  # a longer curve is averaged down to about this many places


@dataclass(frozen=True)
class Line:
    """One grid point in one panel. `low` and `high` bound the seeds; all four arrays are [places]."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    dashes: Any  # DASHED for the furthest of a point's unfinished trials
    stride: int  # logged values averaged into one place


class Name(NamedTuple):
    """A line's name beside the last panel; `height` 0…1: where the line ends; `leader`: whether it gets there."""

    height: float
    text: str
    colour: str
    dashes: Any
    leader: bool


def curves(found: Findings) -> bytes | None:
    """A panel for each of `settings.panels` that has curves, the metric's last; None if nothing was logged."""
    grid, labels, settings = found.shown, found.labels, found.experiment.settings
    lines = {tag: {identity(p.values): line for p in grid if (line := line_of(p, tag))} for tag in settings.panels}
    panels = [tag for tag in settings.panels if lines[tag]]
    if not panels:
        return None
    colours = colours_of(grid, settings)
    last = max(line.step[-1] for tag in panels for line in lines[tag].values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.3))
        figure.subplots_adjust(wspace=0.24)
        for axes, tag in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for key, line in sorted(lines[tag].items(), key=lambda item: colours[item[0]] != GREY):
                draw(axes, line, colours[key])
            finish_panel(axes, tag, list(lines[tag].values()), last)
        name_lines(axes, grid, labels, colours, lines[panels[-1]], {key for tag in panels for key in lines[tag]})
        return png(figure)


def line_of(point: Point, tag: str) -> Line | None:
    """Mean and range over the point's finished trials, at the steps that all of them logged; without a finished one,
    the unfinished trial that came furthest."""
    finished = [t.curves[tag] for t in point.trials if t.counts and tag in t.curves]
    unfinished = [t.curves[tag] for t in point.trials if not t.counts and tag in t.curves]
    if not finished and not unfinished:
        return None
    used = finished or [max(unfinished, key=lambda curve: curve["step"].iloc[-1])]
    values = pd.concat([curve.set_index("step")["value"] for curve in used], axis=1, join="inner").sort_index()
    values = values.replace([math.inf, -math.inf], math.nan).dropna()
    if values.empty:
        return None
    stride = math.ceil(len(values) / BINS)
    place = np.arange(len(values)) // stride
    step, binned = values.index.to_series().groupby(place).mean(), values.groupby(place).mean()
    return Line(
        step.to_numpy(float),
        binned.mean(axis=1).to_numpy(),
        binned.min(axis=1).to_numpy(),
        binned.max(axis=1).to_numpy(),
        SOLID if finished else DASHED,
        stride,
    )


def draw(axes: Axes, line: Line, colour: str) -> None:
    background = colour == GREY
    marker = "o" if len(line.step) == 1 else None  # one place makes no line
    width = 0.8 if background else 1.5
    axes.plot(line.step, line.mean, color=colour, linestyle=line.dashes, lw=width, marker=marker, ms=3)
    if not background and np.any(line.high > line.low):
        axes.fill_between(line.step, line.low, line.high, color=colour, alpha=0.2, lw=0)


def finish_panel(axes: Axes, tag: str, lines: list[Line], last: float) -> None:
    """Labels and limits; `last` is the last step of all panels.

    The first fifth of training may leave the panel: a loss that falls from 5 to 2 would else hide differences of 0.1.
    """
    stride = max(line.stride for line in lines)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(TAG_LABELS.get(tag, tag))
    axes.set_title(f"{tag}, averaged over {stride} logged values" if stride > 1 else tag, loc="left", fontsize=9)
    axes.set_xlim(0, max(last, 1))
    axes.locator_params(axis="x", nbins=5)
    edges = [(line.step, edge) for line in lines for edge in (line.low, line.high)]
    early = 0.2 * max(step[-1] for step, _ in edges)
    shown = np.concatenate([edge[step >= early] for step, edge in edges])
    margin = 0.05 * (np.ptp(shown) or abs(shown[0]) or 1)
    axes.set_ylim(shown.min() - margin, shown.max() + margin)


def name_lines(
    axes: Axes, grid: list[Point], labels: Labels, colours: dict[str, str], ends: dict[str, Line], drawn: set[str]
) -> None:
    """Write the names of the points in `drawn` right of `axes`, each at its line's end in `ends` or as near as the
    others leave room; the grey ones share a name at the bottom."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    names = []
    for point in grid:
        key = identity(point.values)
        if key not in drawn or colours[key] == GREY:
            continue
        text = shortened(labels.point(point.values)) + ("" if point.n else f" ({point.state()})")
        line = ends.get(key)
        if line is None:
            names.append(Name(0.0, text, colours[key], SOLID if point.n else DASHED, leader=False))
        else:
            height = float(np.clip((line.mean[-1] - low) / (high - low), 0, 1))
            names.append(Name(height, text, colours[key], line.dashes, leader=line.step[-1] >= 0.97 * right))
    names.sort(key=lambda name: -name.height)
    others = sum(colours[key] == GREY for key in drawn)
    if others:
        names.append(Name(names[-1].height if names else 0.0, f"{others} others", GREY, SOLID, leader=False))
    beside: Any = {"transform": axes.transAxes, "clip_on": False}
    for name, place in zip(names, spread([name.height for name in names], gap=0.058), strict=True):
        if name.leader:
            axes.plot([1, 1.06], [name.height, place], color=name.colour, lw=0.6, alpha=0.7, **beside)
        axes.plot([1.06, 1.11], [place, place], color=name.colour, lw=1.8, linestyle=name.dashes, **beside)
        axes.text(1.125, place, name.text, va="center_baseline", fontsize=8.5, **beside)
