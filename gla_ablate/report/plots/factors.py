"""What each factor does to the metric: a block a factor, a row a level, all on one axis so that factors compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gla_ablate.report.effects import Effect, Level
from gla_ablate.report.findings import Findings
from gla_ablate.report.intervals import Interval
from gla_ablate.report.labels import Labels, signed
from gla_ablate.report.plots.style import GREY, STYLE, in_order, level_text, metric_label, png

LEVELS = 24  # of one factor; of more, those that do most
INK, BAR, TIE = "#222222", "#7F7F7F", "#8A8A8A"
STRETCH = 3.0  # an interval may widen the axis to so many times the largest effect; one of two seeds can be far wider
ROW = 0.25  # inches


class Row(NamedTuple):
    text: str
    effect: Interval | None
    kind: str  # head | level | reference | unknown


def factor_effects(found: Findings) -> bytes | None:
    """Each level's effect against its factor's reference, all else the same, with its 95 % interval over seeds; None if
    no level has one."""
    rows = [row for effect in found.effects for row in block(effect, found.labels)]
    known = [row.effect for row in rows if row.effect is not None]
    if not known:
        return None
    reach = reach_of(known)
    settings = found.experiment.settings
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, ROW * len(rows)))
        axes = figure.add_axes((0, 0, 1, 1))  # labels stand outside of it; `png` makes room for them
        axes.axvline(0, color="#555555", lw=0.8, zorder=1)
        beside: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center_baseline"}
        for y, row in enumerate(rows):
            weight = "bold" if row.kind == "head" else "normal"
            colour = TIE if row.kind == "unknown" else INK
            axes.annotate(row.text, (0, y), (-6, 0), ha="right", weight=weight, color=colour, **beside)
            if row.kind == "reference":
                axes.plot(0, y, "D", color="white", mec=INK, mew=1.0, ms=5)
                axes.annotate("reference", (1, y), (6, 0), color=TIE, **beside)
            elif row.kind == "unknown":
                axes.annotate("never beside the reference", (1, y), (6, 0), color=TIE, **beside)
            elif row.effect is not None:
                draw(axes, y, row.effect, reach)
                axes.annotate(effect_text(row.effect, found.places), (1, y), (6, 0), **beside)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-reach[0], reach[1])
        axes.locator_params(axis="x", nbins=6)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"change of {metric_label(settings)} against the reference")
        better = {"min": (0.0, "← better", "left"), "max": (1.0, "better →", "right")}[settings.mode]
        axes.text(better[0], 1.0, better[1], ha=better[2], va="bottom", color=TIE, transform=axes.transAxes)
        return png(figure)


def block(effect: Effect, labels: Labels) -> list[Row]:
    """A factor's rows, its name first; none where no level has an effect."""
    if all(level.effect is None for level in effect.levels):
        return []
    name = ", ".join(labels.headers[factor] for factor in effect.factors)
    first = [next(iter(level.values.values())) for level in effect.levels]
    chosen = strongest(effect)
    if len(chosen) < len(effect.levels):
        name += f" ({len(chosen) - 1} of {len(effect.levels) - 1} levels, those that do most)"
    rows = [Row(name, None, "head")]
    for place in in_order(first):
        level = effect.levels[place]
        text = level_text(level.values, labels)
        if place == effect.reference:
            rows.append(Row(text, None, "reference"))
        elif place in chosen:
            rows.append(Row(text, level.effect, "level" if level.effect else "unknown"))
    return rows


def strongest(effect: Effect) -> set[int]:
    """Places of the levels to show: all, or the reference and the `LEVELS` that change the metric most."""

    def size(level: Level) -> float:
        return -1.0 if level.effect is None else abs(level.effect.mean)

    others = [i for i in range(len(effect.levels)) if i != effect.reference]
    others.sort(key=lambda i: -size(effect.levels[i]))
    return {effect.reference, *others[:LEVELS]}


def reach_of(known: list[Interval]) -> tuple[float, float]:
    """How far the axis goes to the left and right of 0: over the intervals, but not much beyond the effects."""
    most = STRETCH * max(abs(effect.mean) for effect in known)
    ends = [end for effect in known for end in (effect.mean, effect.low, effect.high) if end is not None]
    left, right = (min(max(0.0, *(sign * end for end in ends)), most or max(map(abs, ends))) for sign in (-1, 1))
    margin = 0.08 * ((left + right) or 1.0)
    return left + margin, right + margin


def draw(axes: Axes, y: int, effect: Interval, reach: tuple[float, float]) -> None:
    """A disc, hollow for a tie, on its interval; an end beyond the axis is an arrow."""
    colour = TIE if effect.tie else INK
    if effect.low is not None and effect.high is not None:
        low, high = max(effect.low, -reach[0]), min(effect.high, reach[1])
        axes.plot([low, high], [y, y], color=GREY if effect.tie else BAR, lw=3.5, solid_capstyle="butt")
        for end, marker, cut in ((low, "<", low > effect.low), (high, ">", high < effect.high)):
            if cut:
                axes.plot(end, y, marker, color=colour, ms=6, clip_on=False)
    axes.plot(effect.mean, y, "o", color="white" if effect.tie else colour, mec=colour, mew=1.2, ms=5.5)


def effect_text(effect: Interval, places: int) -> str:
    text = signed(effect.mean, places)
    if effect.low is None or effect.high is None:
        return text
    return f"{text}  ({signed(effect.low, places)} to {signed(effect.high, places)})"
