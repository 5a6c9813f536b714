"""The report's tables as columns of text, which Markdown, HTML and (the first) the terminal share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gla_ablate.report.best import choice, choices
from gla_ablate.report.document import Column
from gla_ablate.report.effects import NOTHING_IN_COMMON, Effect
from gla_ablate.report.findings import Findings
from gla_ablate.report.intervals import Interval, verdict
from gla_ablate.report.labels import Labels, decimals, fixed, identity, si, signed, value_text
from gla_ablate.report.lengths import at_length, measured, multiples
from gla_ablate.report.points import Point, paired
from gla_ablate.report.trials import Experiment, Settings, Trial
from gla_ablate.status import FAILED

STATES = (*FAILED, "finished", "interrupted", "running", "queued", "not started")  # the most telling first
SIDE_BY_SIDE = 12  # values of the factors of best_over that stand as columns


def results(found: Findings) -> list[Column]:
    """A row per point, best first, without columns that say nothing here."""
    settings, labels, places, rows = found.experiment.settings, found.labels, found.places, found.ranked
    backends = {p.backend for p in found.shown if p.backend}
    memory = ["" if p.peak_mem_mb is None else f"{p.peak_mem_mb:,.0f}" for p in rows]
    columns = [
        *(factor_column(factor, rows, labels) for factor in labels.varying),
        *(choice_column(factor, rows, found.all_labels) for factor in (settings.best_over if found.variants else [])),
        Column(metric_header(settings), mean_texts(rows, places)),
        Column("Δ", [delta_text(p, places) for p in rows], right=True),
        Column("95 %", ["" if p.is_baseline else ends(p.against, places) for p in rows], spare=6),
        Column("n", [count_text(p) for p in rows], right=True),
        Column("params", [si(p.params, 4) for p in rows], right=True, spare=5),
        Column("state", ["" if p.state_size is None else f"{p.state_size:,}" for p in rows], right=True, spare=3),
        Column("FLOPs/token", [si(p.flops_per_token) for p in rows], right=True, spare=1),
        Column("tokens/s", [si(p.tokens_per_s) for p in rows], right=True, spare=4),
        Column("peak MB", memory, right=True, spare=2),
        Column("backend", [p.backend or "" for p in rows] if len(backends) > 1 else []),
    ]
    return [column for column in columns if any(column.cells)]


def best_of(found: Findings) -> list[Column]:
    """A row per variant: its best value, which end of those tried that is, and the mean at every value."""
    settings, labels = found.experiment.settings, found.labels
    rows = [variant.best for variant in found.variants]
    columns = [*(factor_column(factor, rows, labels) for factor in labels.varying)]
    for factor in settings.best_over:
        columns.append(choice_column(factor, rows, found.all_labels))
        columns.append(Column("edge", [f"{end} tried" if (end := v.edge(factor)) else "" for v in found.variants]))
    tried = choices(found.grid, settings)
    if len(tried) <= SIDE_BY_SIDE:
        for chosen in tried:
            at = [next((p for p in v.tried if choice(p, settings) == chosen), None) for v in found.variants]
            header = choice_text(chosen, found.all_labels)
            cells = ["" if p is None else mean_text(p, found.places, 0) for p in at]
            columns.append(Column(header, cells))
    return [column for column in columns if any(column.cells)]


def at_lengths(found: Findings) -> list[Column]:
    """A row per point, best first, and a column per length; nothing without `eval.lengths`."""
    measure, rows = measured(found), found.ranked
    lengths = multiples([trial for point in rows for trial in point.trials])
    cells = {m: [at_length(point, measure, m) for point in rows] for m in lengths}
    known = [at for column in cells.values() for at in column if at is not None and math.isfinite(at.mean)]
    places = decimals([at.mean for at in known], [at.std for at in known])
    columns = [factor_column(factor, rows, found.labels) for factor in found.labels.varying]
    columns += [Column(f"{m}×", ["" if at is None else at.text(places) for at in cells[m]]) for m in lengths]
    return columns if any(any(column) for column in cells.values()) else []


def effect_of(effect: Effect, found: Findings) -> list[Column]:
    """A row per value of the factor, in grid order."""
    settings, labels, places = found.experiment.settings, found.labels, found.places
    levels = effect.levels
    others = [level.effect for i, level in enumerate(levels) if i != effect.reference]
    judged = [verdict(level.effect, settings.mode, NOTHING_IN_COMMON) for level in levels]
    judged[effect.reference] = "reference"
    columns = [
        *(Column(labels.headers[f], [labels.cell(f, level.values) for level in levels]) for f in effect.factors),
        Column(settings.metric, ["" if v.mean is None else fixed(v.mean, places) for v in levels], right=True),
        Column("effect", ["" if v.effect is None else signed(v.effect.mean, places) for v in levels], right=True),
        Column("95 %", [ends(level.effect, places) for level in levels]),
        Column("verdict", judged),
        Column("seeds", ["" if level.effect is None else str(level.effect.n) for level in levels], right=True),
        Column("settings", ["" if level.effect is None else str(level.settings) for level in levels], right=True),
    ]
    return [column for column in columns if any(column.cells)] if any(others) else columns[: len(effect.factors) + 1]


def against(rows: list[tuple[Point, Point]], found: Findings, name: str) -> list[Column]:
    """A row per pair of a point and what it is held against, which `name` heads where it differs from row to row."""
    labels, places, mode = found.labels, found.places, found.experiment.settings.mode
    differences = [paired(other, point) for point, other in rows]
    columns = [
        Column("point", [labels.point(point.values) for point, _ in rows]),
        Column(name, [labels.point(other.values) for _, other in rows] if name else []),
        Column("difference", ["" if d is None else signed(d.mean, places) for d in differences], right=True),
        Column("95 %", [ends(difference, places) for difference in differences]),
        Column("verdict", [verdict(difference, mode) for difference in differences]),
        Column("seeds", ["" if d is None else str(d.n) for d in differences], right=True),
    ]
    return [column for column in columns if any(column.cells)]


def matrix(found: Findings) -> list[Column]:
    """Every pair of a small grid: row − column, the points numbered from the best."""
    rows = [point for point in found.ranked if point.mean is not None]
    by_pair = {(identity(pair.first.values), identity(pair.second.values)): pair for pair in found.pairs}
    keys = [identity(point.values) for point in rows]
    names = [f"{i} {found.labels.point(point.values)}" for i, point in enumerate(rows, start=1)]
    columns = [Column("row − column", names[:-1])]
    for j in range(1, len(rows)):
        cells = []
        for i in range(len(rows) - 1):
            pair = by_pair.get((keys[i], keys[j]))
            size = "" if pair is None or pair.difference is None else signed(pair.difference.mean, found.places)
            cells.append(f"tie {size}" if pair and pair.verdict == "tie" else size)
        columns.append(Column(f"{j + 1}", cells, right=True))
    return columns


def unfinished(found: Findings) -> list[Column]:
    """The trials that don't count."""
    left = leftovers(found.experiment)
    return [
        Column("trial", [found.all_labels.point(trial.point) for trial in left]),
        Column("seed", [str(trial.seed) for trial in left], right=True),
        Column("status", [trial.status for trial in left]),
        Column("reason", [trial.reason for trial in left]),
        Column("folder", [trial.id for trial in left]),
    ]


def metric_header(settings: Settings) -> str:
    return f"{settings.metric} {'↓' if settings.mode == 'min' else '↑'}"


def factor_column(factor: str, rows: list[Point], labels: Labels) -> Column:
    numbers = all(type(p.values.get(factor)) in (int, float) for p in rows)
    return Column(labels.headers[factor], [labels.cell(factor, p.values) for p in rows], right=numbers)


def choice_column(factor: str, rows: list[Point], labels: Labels) -> Column:
    header, cells, right, _ = factor_column(factor, rows, labels)
    known = ["" if point.mean is None else cell for point, cell in zip(rows, cells, strict=True)]
    return Column(f"best {header}", known, right)


def choice_text(chosen: Mapping[str, Any], labels: Labels) -> str:
    """`lr=0.001`."""
    return " ".join(f"{labels.headers[factor]}={value_text(value)}" for factor, value in chosen.items())


def mean_texts(rows: list[Point], places: int) -> list[str]:
    width = max((len(fixed(p.mean, places)) for p in rows if p.mean is not None), default=0)
    return [mean_text(p, places, width) for p in rows]


def mean_text(point: Point, places: int, width: int) -> str:
    """`1.9834 ± 0.0121`, the mean padded to `width` so that a left-aligned column lines up; without a mean, why."""
    if point.mean is None:
        return point.state()
    mean = fixed(point.mean, places).rjust(width)
    return mean if point.std is None else f"{mean} ± {point.std:.{places}f}"


def delta_text(point: Point, places: int) -> str:
    if point.against is None:
        return ""
    tie = "tie " if point.against.tie else ""
    return "baseline" if point.is_baseline else f"{tie}{signed(point.against.mean, places)}"


def ends(difference: Interval | None, places: int) -> str:
    """An interval from end to end; empty where there is none."""
    if difference is None or difference.low is None or difference.high is None:
        return ""
    return f"{fixed(difference.low, places)} … {fixed(difference.high, places)}"


def count_text(point: Point) -> str:
    return str(point.n) if point.n == len(point.trials) else f"{point.n}/{len(point.trials)}"


def leftovers(experiment: Experiment) -> list[Trial]:
    """The trials that don't count, failed ones first."""
    return sorted((t for t in experiment.trials if not t.counts), key=lambda t: STATES.index(t.status))


def tally(trials: list[Trial]) -> str:
    """`5 of 6 trials finished, 1 failed`."""
    counts = {state: sum(t.status == state for t in trials) for state in STATES if state != "finished"}
    finished = len(trials) - sum(counts.values())
    return f"{finished} of {len(trials)} trials finished" + "".join(f", {n} {s}" for s, n in counts.items() if n)
