"""Two factors at once: the metric of every pair of their levels, averaged over everything else."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gla_ablate.report.balance import arranged, balanced
from gla_ablate.report.effects import Effect
from gla_ablate.report.findings import Findings
from gla_ablate.report.labels import Labels, identity
from gla_ablate.report.plots.style import (
    STYLE,
    in_order,
    level_text,
    metric_label,
    png,
    shortened,
    shown_range,
)
from gla_ablate.report.points import Point
from gla_ablate.report.trials import Settings

LEVELS = 20  # on a side; of more, the best


@dataclass(frozen=True)
class Side:
    """The levels of a factor (or of several that vary together) that a side of the map shows, in their order."""

    factors: tuple[str, ...]
    levels: list[dict[str, Any]]
    all: int  # levels that it has

    def name(self, labels: Labels) -> str:
        name = ", ".join(labels.headers[factor] for factor in self.factors)
        return name if len(self.levels) == self.all else f"{name} (the best {len(self.levels)} of {self.all})"


def heat_map(found: Findings) -> bytes | None:
    """Of the two factors that do most; None where fewer vary, or fewer than two cells have a value."""
    labels, settings = found.labels, found.experiment.settings
    chosen = crossed(found)
    if chosen is None:
        return None
    down, across, cells, over_what = chosen
    known = cells[np.isfinite(cells)]
    if len(known) < 2:
        return None
    low, high = shown_range(known.tolist(), settings)
    colours = matplotlib.colormaps["cividis" if settings.mode == "min" else "cividis_r"]  # dark is good
    norm = Normalize(low, high if high > low else low + 1.0, clip=True)
    texts = [[shortened(level_text(level, labels), 32) for level in side.levels] for side in (down, across)]
    wanted = 0.085 * max(map(len, texts[1]))  # inches that a name takes
    cell = 0.085 * (found.places + 4) + 0.2
    flat = wanted <= max(cell, 1.6 if len(across.levels) <= 8 else 0.0)
    cell = max(cell, wanted) if flat else cell
    turned: Any = {} if flat else {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(cell * len(across.levels), 0.4 * len(down.levels)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(np.ma.masked_invalid(cells), cmap=colours, norm=norm, aspect="auto")
        for (y, x), value in np.ndenumerate(cells):
            if math.isfinite(value):
                dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), colours(norm(value))[:3], strict=True)) < 0.5
                ink = "white" if dark else "black"
                axes.text(x, y, f"{value:.{found.places}f}", ha="center", va="center_baseline", color=ink, fontsize=8.5)
            else:
                hatched: Any = {"facecolor": "none", "edgecolor": "#9A9A9A", "hatch": "////", "linewidth": 0}
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **hatched))
        axes.set_xticks(range(len(across.levels)), texts[1], **turned)
        axes.set_yticks(range(len(down.levels)), texts[0])
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(1, len(across.levels)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(down.levels)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(across.name(labels))
        axes.set_ylabel(down.name(labels))
        own = {*down.factors, *across.factors}
        over = ", ".join(labels.headers[x] for effect in found.effects for x in effect.factors if x not in own)
        title = f"{metric_label(settings)}, mean over {f'{over} and seeds' if over else 'seeds'}"
        axes.set_title("\n".join(filter(None, (title, over_what, "darker is better"))), loc="left", fontsize=9)
        return png(figure)


def crossed(found: Findings) -> tuple[Side, Side, np.ndarray, str] | None:
    """Two factors, with fewer levels and with more, and the `means` of their cells: of those that do most the first two
    that leave no level without a value, or else the first two. None where fewer vary."""
    settings = found.experiment.settings
    first = None
    for two in itertools.combinations(sorted(found.effects, key=lambda effect: -strength(effect)), 2):
        down, across = sorted((side(effect, settings) for effect in two), key=lambda side: len(side.levels))
        map_of_two = down, across, *means(found.shown, found.labels, down, across)
        first = first or map_of_two
        known = np.isfinite(map_of_two[2])
        if known.any(axis=0).all() and known.any(axis=1).all():
            return map_of_two
    return first


def strength(effect: Effect) -> float:
    """The range of a factor's effects, the reference's 0 among them."""
    found = [0.0, *(level.effect.mean for level in effect.levels if level.effect is not None)]
    return max(found) - min(found)


def side(effect: Effect, settings: Settings) -> Side:
    first = [next(iter(level.values.values())) for level in effect.levels]
    order = in_order(first)
    sign = 1 if settings.mode == "min" else -1

    def rank(place: int) -> float:
        mean = effect.levels[place].mean
        return math.inf if mean is None else sign * mean

    kept = set(sorted(order, key=rank)[:LEVELS])
    return Side(effect.factors, [effect.levels[i].values for i in order if i in kept], len(order))


def means(grid: list[Point], labels: Labels, down: Side, across: Side) -> tuple[np.ndarray, str]:
    """[down, across]: the mean of each cell, all over the same settings of the other factors and the same seeds
    (`balance`), NaN for a cell without a trial or with too little in common with the rest; and what they are over,
    where that isn't all there is."""
    others = [factor for factor in labels.varying if factor not in (*down.factors, *across.factors)]
    places = [{identity(level): i for i, level in enumerate(side.levels)} for side in (down, across)]
    shape = (len(down.levels), len(across.levels))

    def cell_of(point: Point) -> int | None:
        y, x = (
            place.get(identity({factor: point.values.get(factor) for factor in side.factors}))
            for place, side in zip(places, (down, across), strict=True)
        )
        return None if y is None or x is None else y * shape[1] + x

    trials = arranged(grid, [cell_of(point) for point in grid], others)
    cells = np.full(math.prod(shape), math.nan)
    if not trials.counted.any():
        return cells.reshape(shape), ""
    block = balanced(trials.counted, anchor=int(trials.counted.sum(axis=(1, 2)).argmax()))
    for cell in np.flatnonzero(block.members):
        cells[cell] = block.of(trials.values[cell]).mean()
    kept = [f"{block.settings.sum()} of {len(trials.settings)} settings"] if not block.settings.all() else []
    kept += [f"{block.seeds.sum()} of {len(trials.seeds)} seeds"] if not block.seeds.all() else []
    return cells.reshape(shape), f"over {' and '.join(kept)}, which all cells have" if kept else ""
