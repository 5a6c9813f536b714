"""`report: {expect_equal: {over: model.chunk_size}}`: a factor that should change no curve, and whether it does.

Trials that differ in the factor alone are held against each other seed by seed, at every step at which both logged the
metric. The same seed means the same weights and batches, so only rounding can tell them apart, which training
amplifies: not to the last digit, but far less than what other weights and batches do. So two curves are equal where
they never differ by more than `tolerance` of the metric, and beside it stands how much seeds differ.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from gla_ablate.grid import flatten
from gla_ablate.report.findings import Findings
from gla_ablate.report.labels import identity, value_text
from gla_ablate.report.trials import Experiment, Trial


@dataclass(frozen=True)
class Gap:
    """How far a trial's curve is from that of the one it should equal, at its worst."""

    trial: Trial
    reference: Trial
    size: float | None  # share of the metric; None where one of them doesn't count
    step: int | None


@dataclass(frozen=True)
class Check:
    verdict: Literal["passed", "failed", "open"]
    text: str


def check(found: Findings) -> Check | None:
    """None where the experiment expects nothing to be equal."""
    experiment = found.experiment
    wanted = experiment.settings.expect_equal
    if not wanted.get("over"):
        return None
    over, tolerance, metric = wanted["over"], wanted["tolerance"], experiment.settings.metric
    name = found.all_labels.headers.get(over, over)
    all_gaps = gaps(experiment, over)
    sizes = [(gap.size, gap) for gap in all_gaps if gap.size is not None]
    if not sizes:
        why = "no two trials that differ in it alone have finished" if all_gaps else "all trials here have the same"
        return Check("open", f"Check not made: equal over {name}: {why}.")
    size, worst = max(sizes, key=lambda pair: pair[0])
    beyond, missing = sum(size > tolerance for size, _ in sizes), len(all_gaps) - len(sizes)
    at = f" at step {worst.step}" if worst.step is not None else ""
    here, there = (value_text(trial.point[over]) for trial in (worst.trial, worst.reference))
    rest = {factor: value for factor, value in worst.trial.point.items() if factor != over}
    others = f"{found.all_labels.point(rest)}, " if set(rest) & set(found.all_labels.varying) else ""
    which = f"{others}{name} {here} against {there}, seed {worst.trial.seed}{at}"
    most = f"{metric} differs by {percent(size)} at most ({which})"
    if math.isinf(size):
        most = f"{metric} leaves the finite numbers ({which})"
    scale = seed_spread(found)
    noise = "" if scale is None else f" The std over the seeds of a point is {percent(scale)}."
    if scale is not None and tolerance >= scale:
        noise += " Any change smaller than that passes: a weak check."
    pairs = f"{len(sizes)} pair{'s' * (len(sizes) != 1)} of trials that differ in it alone"
    if beyond:
        said = f"CHECK FAILED: not equal over {name}. In {beyond} of {pairs} "
        return Check("failed", f"{said}a curve is off by more than {percent(tolerance)}: {most}.{noise}")
    if missing:
        said = f"Check not complete: equal over {name}. {missing} more can't be compared yet; in {pairs} "
        return Check("open", f"{said}{most}, of {percent(tolerance)} allowed.{noise}")
    return Check(
        "passed", f"Check passed: equal over {name}. In {pairs} {most}, of {percent(tolerance)} allowed.{noise}"
    )


def gaps(experiment: Experiment, over: str) -> list[Gap]:
    """Of every trial but the references: with the baseline's value of `over`, or else the first of those that it should
    equal."""
    alike: dict[str, list[Trial]] = {}
    for trial in experiment.trials:
        rest = {factor: value for factor, value in trial.point.items() if factor != over}
        alike.setdefault(identity([rest, trial.seed]), []).append(trial)
    flat = flatten(experiment.settings.baseline)
    baseline = {key: value for key, value in flat.items() if key == over or key.startswith(f"{over}.")}
    found = []
    for trials in alike.values():
        reference = next((t for t in trials if flatten({over: t.point.get(over)}) == baseline), trials[0])
        found += [gap(trial, reference, experiment.settings.metric) for trial in trials if trial is not reference]
    return found


def gap(trial: Trial, reference: Trial, metric: str) -> Gap:
    """The largest difference of two curves as a share of the larger value, over the steps that both logged. One that
    left the finite numbers while the other didn't is infinitely far off."""
    ended = {trial.counts: trial, reference.counts: reference}
    if len(ended) == 2 and ended[False].status == "diverged":
        return Gap(trial, reference, math.inf, ended[False].step)
    if not (trial.counts and reference.counts):
        return Gap(trial, reference, None, None)
    own, other = curve(trial, metric).align(curve(reference, metric), join="inner")
    larger = pd.concat([own.abs(), other.abs()], axis=1).max(axis=1, skipna=False)
    apart = ((own - other).abs() / larger).where(larger > 0, 0.0).mask(~(larger < math.inf), math.inf)
    if apart.empty:
        return Gap(trial, reference, None, None)
    return Gap(trial, reference, float(apart.max()), int(apart.idxmax()))


def curve(trial: Trial, metric: str) -> pd.Series:
    """Step → value; of a metric that a trial has once, that value."""
    known = trial.curves.get(metric)
    if known is None:
        return pd.Series([trial.value], index=[trial.step])
    return known.drop_duplicates("step", keep="last").set_index("step")["value"]


def seed_spread(found: Findings) -> float | None:
    """The sample std over the seeds of a point as a share of its mean, the median of all points; None for one seed."""
    spreads = [p.std / abs(p.mean) for p in found.grid if p.std is not None and p.mean]
    return statistics.median(spreads) if spreads else None


def percent(share: float) -> str:
    return f"{100 * share:.2g} %"
