"""The report's CSV files: everything in full precision, empty where unknown.

`results.csv`   a row per grid point, in grid order
`best.csv`      with `best_over`, a row per variant in grid order, at its best: as results.csv, the difference to the
                baseline at its own best, `tried` values
`lengths.csv`   with `eval.lengths`, a row per grid point, length and measure: mean and std over seeds
`trials.csv`    a row per trial, in grid order
`effects.csv`   a row per factor and value: mean, and the effect against the reference, all else the same
`pairs.csv`     a row per pair of points that are compared: point − other, with its interval and the verdict on `point`
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from gla_ablate.experiment_checks import length_tag
from gla_ablate.report.effects import NOTHING_IN_COMMON, Effect
from gla_ablate.report.findings import Findings
from gla_ablate.report.intervals import Interval, verdict
from gla_ablate.report.labels import identity, value_text
from gla_ablate.report.lengths import MEASURES, at_length, multiples, row_length
from gla_ablate.report.points import Point
from gla_ablate.report.trials import Experiment

EFFECTS = ("factor", "value", "reference", "mean", "effect", "low", "high", "verdict", "n", "settings")
PAIRS = ("point", "other", "n", "difference", "low", "high", "verdict", "point_row", "other_row")


def results_csv(found: Findings) -> str:
    """With `best_over`, each point against the baseline at the same values of those factors."""
    return written([point_row(point, found.experiment) for point in found.grid])


def best_csv(found: Findings) -> str | None:
    """None without `best_over`."""
    if not found.variants:
        return None
    rows = [point_row(variant.best, found.experiment) | {"tried": variant.known} for variant in found.variants]
    return written(rows)


def point_row(p: Point, experiment: Experiment) -> dict[str, Any]:
    return (
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
        | dict(zip(("delta_low", "delta_high"), ends(None if p.is_baseline else p.against), strict=True))
    )


def lengths_csv(found: Findings) -> str | None:
    """None where nothing was evaluated at a length. `multiple` is of the length of training, `tokens` a row's."""
    rows = [
        {factor: plain(point.values.get(factor)) for factor in found.experiment.factors}
        | {"multiple": multiple, "tokens": row_length(point, multiple), "metric": length_tag(measure, multiple)}
        | {"mean": at.mean, "std": at.std, "n": at.n}
        for point in found.grid
        for measure in MEASURES
        for multiple in multiples(point.trials)
        if (at := at_length(point, measure, multiple))
    ]
    return written(rows) if rows else None


def trials_csv(experiment: Experiment) -> str:
    """Of every trial, whether it counts or not."""
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
    return written(rows)


def effects_csv(found: Findings) -> str:
    """`settings` of the other factors, `n` seeds; a group of factors that vary together is one, their names joined."""
    rows: list[tuple[Any, ...]] = []
    for effect in found.effects:
        reference = level_text(effect, effect.reference)
        for i, level in enumerate(effect.levels):
            row = (" + ".join(effect.factors), level_text(effect, i), reference, level.mean)
            if i == effect.reference:
                rows.append((*row, None, None, None, "reference", None, None))
            else:
                size, n = (None, 0) if level.effect is None else (level.effect.mean, level.effect.n)
                judged = verdict(level.effect, found.experiment.settings.mode, NOTHING_IN_COMMON)
                rows.append((*row, size, *ends(level.effect), judged, n, level.settings))
    return written([dict(zip(EFFECTS, row, strict=True)) for row in rows], EFFECTS)


def pairs_csv(found: Findings) -> str:
    """Points as the report labels them; `point_row` and `other_row` count the rows of results.csv from 0."""
    place = {identity(point.values): row for row, point in enumerate(found.grid)}
    label = {identity(point.values): found.labels.point(point.values) for point in found.shown}
    rows = []
    for pair in found.pairs:
        first, second = identity(pair.first.values), identity(pair.second.values)
        size, n = (None, 0) if pair.difference is None else (pair.difference.mean, pair.difference.n)
        row = (label[first], label[second], n, size, *ends(pair.difference), pair.verdict, place[first], place[second])
        rows.append(dict(zip(PAIRS, row, strict=True)))
    return written(rows, PAIRS)


def level_text(effect: Effect, index: int) -> Any:
    values = effect.levels[index].values
    if len(values) == 1:
        return plain(next(iter(values.values())))
    return " ".join(f"{factor}={value_text(value)}" for factor, value in values.items())


def ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def plain(value: Any) -> Any:
    """A factor's value for a cell: numbers and text as they are, the rest as `value_text` writes it."""
    return value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else value_text(value)


def written(rows: list[dict[str, Any]], columns: tuple[str, ...] | None = None) -> str:
    return pd.DataFrame(rows, dtype=object, columns=columns).to_csv(index=False, lineterminator="\n")
