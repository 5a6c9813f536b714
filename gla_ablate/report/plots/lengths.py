"""Length extrapolation: a panel over the lengths of rows, and one over the positions of the longest."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from gla_ablate.experiment_checks import length_tag
from gla_ablate.report.findings import Findings
from gla_ablate.report.labels import identity
from gla_ablate.report.lengths import longest, measured, multiples
from gla_ablate.report.plots.curves import SOLID, Line, draw, name_lines
from gla_ablate.report.plots.style import GREY, STYLE, colours_of, png
from gla_ablate.report.points import Point

LABELS = {"loss": "validation loss (nats/token)", "accuracy": "validation accuracy (fraction)"}


def at_lengths(found: Findings) -> bytes | None:
    """None where nothing was evaluated at a length. Points much worse than the rest may leave a panel."""
    grid, labels, measure = found.shown, found.labels, measured(found)
    by_length = {identity(p.values): line for p in grid if (line := over_lengths(p, measure))}
    by_position = {identity(p.values): line for p in grid if (line := over_positions(p, measure))}
    panels = [panel for panel in (by_length, by_position) if panel]
    if not by_length:
        return None
    colours = colours_of(grid, found.experiment.settings)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.3))
        figure.subplots_adjust(wspace=0.24)
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, lines in zip(row, panels, strict=True):
            axes.axvline(1, color="#8A8A8A", lw=0.9, linestyle=(0, (4, 3)), zorder=1)
            for key, line in sorted(lines.items(), key=lambda item: colours[item[0]] != GREY):
                draw(axes, line, colours[key])
                if lines is by_length:
                    axes.plot(line.step, line.mean, "o", color=colours[key], ms=2.5 if colours[key] == GREY else 4)
            limit(axes, lines, lower=measure == "loss")
        over_lengths_axis(row[0], by_length)
        row[0].set_ylabel(LABELS[measure])
        if by_position:
            over_positions_axis(row[1], by_position, multiples([t for p in grid for t in p.trials]))
        name_lines(row[-1], grid, labels, colours, panels[-1], {*by_length, *by_position})
        return png(figure)


def over_lengths(point: Point, measure: str) -> Line | None:
    """Against multiples of the length of training; only those that all seeds that count have, and are finite."""
    counted = [trial for trial in point.trials if trial.counts]
    lengths = multiples(counted)
    values = [[trial.at_lengths.get(length_tag(measure, m), math.nan) for m in lengths] for trial in counted]
    return line(np.array(lengths, float), np.array(values, float))


def over_positions(point: Point, measure: str) -> Line | None:
    """Against positions in the longest rows, in multiples of the length of training: the mean since the place before.
    Places are half an octave apart, or a bucket where that is more: later ones average more of the text's own ups and
    downs, which all points share."""
    known = [own for trial in point.trials if trial.counts and (own := longest(trial)) is not None]
    if not known:
        return None
    values = pd.concat([by_half_octave(own, measure) for own in known], axis=1, join="inner").sort_index()
    return line(values.index.to_numpy(float), values.to_numpy().T)


def by_half_octave(own: pd.DataFrame, measure: str) -> pd.Series:
    """Where a half octave ends → the mean over the tokens in it."""
    octave = np.ceil((2 * np.log2(own["until"])).round(9))
    sums = own.assign(sum=own[measure] * own["tokens"]).groupby(octave)[["sum", "tokens"]].sum()
    return (sums["sum"] / sums["tokens"]).set_axis(own["until"].groupby(octave).max())


def line(x: np.ndarray, values: np.ndarray) -> Line | None:
    """`values` [seeds, places]."""
    if not values.size:
        return None
    whole = np.isfinite(values).all(axis=0)
    x, values = x[whole], values[:, whole]
    return Line(x, values.mean(0), values.min(0), values.max(0), SOLID, 1) if len(x) else None


def limit(axes: Axes, lines: dict[str, Line], lower: bool) -> None:
    """Shows all, but for losses so much above the lowest that they would hide all other differences: by more than a
    quarter of it, and than five times what is usual."""
    means, lows, highs = (np.concatenate([getattr(own, x) for own in lines.values()]) for x in ("mean", "low", "high"))
    above = means - means.min()
    shown = above <= (max(means.min() / 4, 5 * float(np.median(above))) if lower else math.inf)
    low, high = lows[shown].min(), highs[shown].max()
    margin = 0.06 * ((high - low) or abs(low) or 1.0)
    axes.set_ylim(low - margin, high + margin)


def over_lengths_axis(axes: Axes, lines: dict[str, Line]) -> None:
    lengths = sorted({float(x) for own in lines.values() for x in own.step})
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths[0], 1) / 1.15, lengths[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(times))
    axes.set_xlabel("length of rows / length of training")
    axes.set_title("by length, over all positions", loc="left", fontsize=9)


def over_positions_axis(axes: Axes, lines: dict[str, Line], lengths: list[int]) -> None:
    first = min(own.step[0] for own in lines.values())
    axes.set_xscale("log", base=2)
    axes.set_xlim(first / 1.15, lengths[-1] * 1.02)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(times))
    axes.set_xlabel("position / length of training")
    axes.set_title(f"by position, in rows of {lengths[-1]}×", loc="left", fontsize=9)


def times(x: float, _: Any) -> str:
    return f"{x:g}×"
