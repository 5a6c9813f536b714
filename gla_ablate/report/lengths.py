"""What trials found at other lengths than they trained on (`eval.lengths`), over the seeds that count."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from gla_ablate.experiment_checks import AT_LENGTH, length_tag
from gla_ablate.report.labels import fixed
from gla_ablate.report.points import Point
from gla_ablate.report.trials import Trial

if TYPE_CHECKING:
    from gla_ablate.report.findings import Findings

MEASURES = ("loss", "accuracy")  # that an evaluation has; accuracy on tasks alone


@dataclass(frozen=True)
class Mean:
    """Over seeds. Not finite where a seed's value isn't, which tells of the model and is not left out."""

    mean: float
    std: float | None  # sample standard deviation; None for one seed, and where a value isn't finite
    n: int

    def text(self, places: int) -> str:
        if not math.isfinite(self.mean):
            return "not finite"
        mean = fixed(self.mean, places)
        return mean if self.std is None else f"{mean} ± {self.std:.{places}f}"


def measured(found: Findings) -> str:
    """What the table and the figure show: accuracy where the report's metric is one, and was evaluated; else loss."""
    logged: set[str] = set().union(*(trial.at_lengths for trial in found.experiment.trials))
    known = any(name.startswith("eval/accuracy_at_") for name in logged)
    return "accuracy" if known and "accuracy" in found.experiment.settings.metric else "loss"


def multiples(trials: Iterable[Trial]) -> list[int]:
    """Of the length of training, at which any of the trials that count was evaluated."""
    tags = {name for trial in trials if trial.counts for name in trial.at_lengths}
    return sorted({int(match[1]) for name in tags if (match := AT_LENGTH.fullmatch(name))})


def at_length(point: Point, measure: str, multiple: int) -> Mean | None:
    """None where no trial that counts was evaluated there."""
    name = length_tag(measure, multiple)
    values = [trial.at_lengths[name] for trial in point.trials if trial.counts and name in trial.at_lengths]
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Mean(math.nan, None, len(values))
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def row_length(point: Point, multiple: int) -> int | None:
    """Tokens of a row so many times the length of training; None where no trial that counts says."""
    for trial in point.trials:
        if trial.counts and trial.positions is not None and len(trial.positions):
            last = trial.positions.iloc[-1]
            return int(last["end"]) // int(last["multiple"]) * multiple
    return None


def longest(trial: Trial) -> pd.DataFrame | None:
    """Of the trial's longest rows the buckets with targets, in order, with `until`, their ends in lengths of
    training."""
    known = trial.positions
    if known is None or known.empty:
        return None
    own = known[known["multiple"] == known["multiple"].max()]
    trained = own["end"].iloc[-1] / own["multiple"].iloc[-1]
    return own.assign(until=own["end"] / trained)[own["tokens"] > 0]


def curves_by_position(trial: Trial) -> dict[str, pd.DataFrame]:
    """eval/loss_by_position and, of a task, eval/accuracy_by_position, as TensorBoard has them: the step is a
    position."""
    own = longest(trial)
    if own is None:
        return {}
    curves = {
        f"eval/{measure}_by_position": own[["end", measure]].set_axis(["step", "value"], axis=1) for measure in MEASURES
    }
    return {name: curve for name, curve in curves.items() if curve["value"].notna().any()}
