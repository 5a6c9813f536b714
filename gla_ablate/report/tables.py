"""The report as rows: `results.csv`, `trials.csv`, and the table that Markdown and the terminal share."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from gla_ablate.report.labels import Labels, decimals, si, signed, value_text
from gla_ablate.report.points import Point, ranked
from gla_ablate.report.trials import Experiment, Trial
from gla_ablate.status import FAILED

STATES = (*FAILED, "finished", "interrupted", "running", "queued", "not started")  # the most telling first


class Column(NamedTuple):
    """A column of text. A terminal that is too narrow drops columns with `spare` > 0, lowest first."""

    header: str
    cells: list[str]
    right: bool = False
    spare: int = 0


def results_csv(experiment: Experiment, grid: list[Point]) -> str:
    """A row per grid point in grid order; numbers in full precision, empty where unknown."""
    rows = [
        {factor: plain(p.values.get(factor)) for factor in experiment.factors}
        | {
            "metric": experiment.settings.metric,
            "mean": p.mean,
            "std": p.std,
            "n": p.n,
            "delta": p.delta,
            "params": p.params,
            "state_size": p.state_size,
            "flops_per_token": p.flops_per_token,
            "tokens_per_s": p.tokens_per_s,
            "peak_mem_mb": p.peak_mem_mb,
            "backend": p.backend,
        }
        for p in grid
    ]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def trials_csv(experiment: Experiment) -> str:
    """A row per trial in grid order, whether it counts or not."""
    rows = [
        {"id": trial.id}
        | {factor: plain(trial.point.get(factor)) for factor in experiment.factors}
        | {
            "seed": trial.seed,
            "status": trial.status,
            "reason": trial.reason or None,
            "metric": experiment.settings.metric,
            "value": trial.value,
            "step": trial.step,
        }
        | {key: trial.result.get(key) for key in ("steps", "tokens", "seconds", "params", "state_size")}
        | {key: trial.result.get(key) for key in ("flops_per_token", "tokens_per_s", "peak_mem_mb")}
        | {key: trial.stamp.get(key) for key in ("backend", "device")}
        | {f"git_{key}": (trial.stamp.get("git") or {}).get(key) for key in ("sha", "dirty")}
        | {f"data_{key}": (trial.stamp.get("data") or {}).get(key) for key in ("name", "sha256")}
        for trial in experiment.trials
    ]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def plain(value: Any) -> Any:
    """A factor's value for a CSV cell: numbers and text as they are, the rest as `value_text` writes it."""
    return value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else value_text(value)


def results(experiment: Experiment, grid: list[Point], labels: Labels) -> list[Column]:
    """A row per grid point, best first, without columns that say nothing here."""
    settings = experiment.settings
    rows = ranked(grid, settings)
    places = decimals([p.mean for p in grid], [p.std for p in grid])
    width = max((len(f"{p.mean:.{places}f}") for p in grid if p.mean is not None), default=0)
    arrow = "↓" if settings.mode == "min" else "↑"
    backends = {p.backend for p in grid if p.backend}
    memory = ["" if p.peak_mem_mb is None else f"{p.peak_mem_mb:,.0f}" for p in rows]
    columns = [
        *(factor_column(factor, rows, labels) for factor in labels.varying),
        Column(f"{settings.metric} {arrow}", [mean_text(p, places, width) for p in rows]),
        Column("Δ", [delta_text(p, places) for p in rows], right=True),
        Column("n", [str(p.n) if p.n == len(p.trials) else f"{p.n}/{len(p.trials)}" for p in rows], right=True),
        Column("params", [si(p.params, 4) for p in rows], right=True, spare=5),
        Column("state", ["" if p.state_size is None else f"{p.state_size:,}" for p in rows], right=True, spare=3),
        Column("FLOPs/token", [si(p.flops_per_token) for p in rows], right=True, spare=1),
        Column("tokens/s", [si(p.tokens_per_s) for p in rows], right=True, spare=4),
        Column("peak MB", memory, right=True, spare=2),
        Column("backend", [p.backend or "" for p in rows] if len(backends) > 1 else []),
    ]
    return [column for column in columns if any(column.cells)]


def factor_column(factor: str, rows: list[Point], labels: Labels) -> Column:
    numbers = all(type(p.values.get(factor)) in (int, float) for p in rows)
    return Column(labels.headers[factor], [labels.cell(factor, p.values) for p in rows], right=numbers)


def mean_text(point: Point, places: int, width: int) -> str:
    """`1.9834 ± 0.0121`, the mean padded to `width` so that a left-aligned column lines up; without a mean, why."""
    if point.mean is None:
        return point.state()
    mean = f"{point.mean:>{width}.{places}f}"
    return mean if point.std is None else f"{mean} ± {point.std:.{places}f}"


def delta_text(point: Point, places: int) -> str:
    if point.delta is None:
        return ""
    return "baseline" if point.is_baseline else signed(point.delta, places)


def leftovers(experiment: Experiment) -> list[Trial]:
    """The trials that don't count, failed ones first."""
    return sorted((t for t in experiment.trials if not t.counts), key=lambda t: STATES.index(t.status))


def tally(trials: list[Trial]) -> str:
    """`5 of 6 trials finished, 1 failed`."""
    counts = {state: sum(t.status == state for t in trials) for state in STATES if state != "finished"}
    finished = len(trials) - sum(counts.values())
    return f"{finished} of {len(trials)} trials finished" + "".join(f", {n} {s}" for s, n in counts.items() if n)
