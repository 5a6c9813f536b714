"""What an experiment's folder says: its grid, and for each trial its state, curves, result and stamp.

Reads `experiment.json` and each trial's `status.json`, `metrics.csv`, `positions.csv`, `result.json` and `stamp.json`,
and where the baseline has a key that the grid doesn't vary, `config.yaml`; nothing else.
A trial that still runs may be read: a half-written last line of `metrics.csv` is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from gla_ablate import curves
from gla_ablate.errors import ConfigError, nearest
from gla_ablate.grid import flatten
from gla_ablate.status import FAILED, STATUSES, read_json
from gla_ablate.yaml_io import read_yaml

MEMORY = re.compile(r"gate/layer(\d+)/head(\d+)/memory")  # tags of `gate_statistics.GateStatistics`
POSITIONS: dict[str, Any] = {
    "multiple": "int64",
    "start": "int64",
    "end": "int64",
    "tokens": "int64",
    "loss": "float64",
    "accuracy": "float64",
}  # columns of positions.csv


@dataclass(frozen=True)
class Settings:
    """The `report:` part of an experiment."""

    metric: str = "val/loss"  # any logged tag
    mode: str = "min"  # min | max: which end of the metric is good
    pick: str = "last"  # last | best: which of a trial's logged values stands for it
    baseline: dict[str, Any] = field(default_factory=dict)  # dotted key → value; empty: no differences are shown
    best_over: list[str] = field(default_factory=list)  # factors; each variant is shown at its best value of them
    expect_equal: dict[str, Any] = field(default_factory=dict)  # over, tolerance (`equality`)

    @property
    def panels(self) -> list[str]:
        """Tags that get a panel of curves, the metric last, unless it has one value a trial."""
        others = [tag for tag in ("train/loss", "val/loss") if tag != self.metric]
        return others if self.metric.startswith("eval/") else [*others, self.metric]


@dataclass(frozen=True)
class Trial:
    """One trial as its files tell it. It `counts` in its grid point's mean if it finished with a finite metric."""

    id: str
    point: dict[str, Any]  # factor → value
    seed: int
    status: str  # finished | interrupted | running | queued | not started | one of `status.FAILED`
    reason: str  # why it doesn't count; empty for one that does
    value: float | None  # the metric so far, as `pick` says; None if never logged or not finite
    step: int | None  # optimiser steps done at `value`
    curves: dict[str, pd.DataFrame]  # panel's tag → columns step, value; only tags that were logged
    tags: frozenset[str]  # every tag that was logged
    config: dict[str, Any] | None  # of the baseline's keys that some point doesn't set; None where unknown or not asked
    result: dict[str, Any]
    stamp: dict[str, Any]
    at_lengths: dict[str, float] = field(default_factory=dict)  # eval/loss_at_4x and the like → value
    positions: pd.DataFrame | None = None  # `positions.csv`; None without one
    memory: dict[tuple[int, int], float] = field(default_factory=dict)  # (layer, head) → tokens, as logged last

    @property
    def counts(self) -> bool:
        return self.status == "finished" and self.value is not None


@dataclass(frozen=True)
class Experiment:
    """`experiment.json` with its trials' files."""

    name: str
    factors: list[str]
    settings: Settings
    trials: list[Trial]
    command: str | None  # the line that made it, where the launcher noted it

    def hint(self) -> str:
        """What to say when no trial logged the metric: the nearest logged tag."""
        tags = sorted(set().union(*(trial.tags for trial in self.trials)))
        if not tags or self.settings.metric in tags:
            return ""
        metric = self.settings.metric
        return f"No trial logged {metric!r}{nearest(metric, tags)} (logged: {', '.join(tags)})."


def load(folder: Path) -> Experiment:
    """The experiment in `folder`; `ConfigError` if there is none."""
    record = read_json(folder / "experiment.json") or {}
    if not record:
        raise ConfigError(
            f"{folder}: no experiment.json here, so there is nothing to report (run the experiment first)"
        )
    report = record.get("report") or {}
    settings = Settings(**{f.name: report[f.name] for f in fields(Settings) if report.get(f.name) is not None})
    wanted = flatten(settings.baseline).keys()
    unset = {key for t in record["trials"] for key in wanted - flatten(t["point"]).keys()}
    trials = [load_trial(folder / t["id"], t["id"], t["point"], t["seed"], settings, unset) for t in record["trials"]]
    return Experiment(record["name"], record["factors"], settings, trials, record.get("command"))


def load_trial(
    folder: Path, id: str, point: dict[str, Any], seed: int, settings: Settings, keys: Set[str] = frozenset()
) -> Trial:
    """The trial in `folder`, which need not exist yet; of its config, `keys`."""
    result, stamp, progress = (read_json(folder / name) or {} for name in ("result.json", "stamp.json", "status.json"))
    metrics = read_metrics(folder / "metrics.csv")
    by_tag = dict(iter(metrics.groupby("metric")[["step", "value"]]))
    value, step, trouble = pick(by_tag.get(settings.metric), settings)
    status, reason = state(progress, result)
    last = {tag: float(curve["value"].iloc[-1]) for tag, curve in by_tag.items()}
    # of a file without a row only its text tells whether it is sound
    sound = not metrics.empty or curves.read(curves.text_of(folder / "metrics.csv")) is not None
    if status == "finished" and not (sound and curves.ends_as_told(last, result)):
        value, step, trouble = None, None, "metrics.csv is damaged: the same command runs it again"
    return Trial(
        id=id,
        point=point,
        seed=seed,
        status=status,
        reason=trouble if status == "finished" else reason,
        value=value,
        step=step,
        curves={tag: by_tag[tag] for tag in settings.panels if tag in by_tag},
        tags=frozenset(by_tag),
        config=read_config(folder / "config.yaml", keys) if keys else None,
        result=result,
        stamp=stamp,
        at_lengths={tag: float(by_tag[tag]["value"].iloc[-1]) for tag in by_tag if tag.startswith("eval/")},
        positions=read_positions(folder / "positions.csv"),
        memory={
            (int(match[1]), int(match[2])): float(curve["value"].iloc[-1])
            for tag, curve in by_tag.items()
            if (match := MEMORY.fullmatch(tag))
        },
    )


def state(progress: dict[str, Any], result: dict[str, Any]) -> tuple[str, str]:
    """(status, why it isn't finished) from `status.json` and `result.json`, which is written last."""
    status, why = progress.get("status"), str(progress.get("reason") or "")
    if status not in STATUSES:
        return "not started", ""
    at = f"at step {progress.get('step') or 0} of {progress.get('max_steps')}"
    if status == "finished":
        return ("finished", "") if result else ("interrupted", "ended before it wrote its result")
    if status == "running":
        return status, at
    if status in FAILED:
        return status, why or f"{at}, no reason given"
    if status == "interrupted":
        return status, why or at
    return status, "waits for its turn" if status == "queued" else ""


def pick(curve: pd.DataFrame | None, settings: Settings) -> tuple[float | None, int | None, str]:
    """(value, its step, what is wrong) of the metric's curve. `best` looks among finite values only."""
    if curve is None:
        return None, None, f"logged no {settings.metric}"
    if settings.pick == "best":
        finite = curve[curve["value"].abs() < math.inf]
        if finite.empty:
            return None, None, f"{settings.metric} was never finite"
        values = finite["value"]
        row = finite.loc[values.idxmin() if settings.mode == "min" else values.idxmax()]
    else:
        row = curve.iloc[-1]
    value, step = float(row["value"]), int(row["step"])
    if not math.isfinite(value):
        return None, step, f"{settings.metric} is {value} at step {step}"
    return value, step, ""


def read_config(path: Path, keys: Set[str]) -> dict[str, Any] | None:
    """Those of the dotted `keys` that the config at `path` has; None if it is missing or damaged."""
    try:
        values = flatten(read_yaml(path))
    except ConfigError:
        return None
    return {key: values[key] for key in values.keys() & keys}


def read_positions(path: Path) -> pd.DataFrame | None:
    """`positions.csv` (`lengths.py`); None if there is none, or none that can be read."""
    try:
        frame = pd.read_csv(path, dtype=POSITIONS)
        return frame[list(POSITIONS)]
    except (OSError, ValueError, KeyError):
        return None


def read_metrics(path: Path) -> pd.DataFrame:
    """`metrics.csv` as columns step (int), metric (str), value (float, may be NaN), in the order of steps; without rows
    if the file is damaged."""
    rows = curves.read(curves.text_of(path)) or []
    frame = pd.DataFrame(rows, columns=curves.HEADER.split(","))
    frame = frame.astype({"step": "int64", "value": "float64"})  # a frame without rows has no types yet
    return frame.sort_values("step", kind="stable", ignore_index=True)
