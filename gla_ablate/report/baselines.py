"""The baseline of each point: the one that differs from it in the baseline's keys alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from gla_ablate.grid import flatten
from gla_ablate.pairing import Pairing
from gla_ablate.report.labels import Labels, listed, value_text
from gla_ablate.report.points import Point, paired
from gla_ablate.report.trials import Settings


def with_baselines(grid: list[Point], settings: Settings, ignored: Iterable[str] = ()) -> list[Point]:
    """The points of `grid`, each with the one point that has the baseline's values and otherwise equals it (`Pairing`),
    but for the factors in `ignored`; without a baseline where not exactly one does.

    A key of the baseline that a point doesn't set has the value that its trials' config has.
    """
    if not settings.baseline:
        return grid

    def held(point: Point, found: list[Point]) -> Point:
        if len(found) != 1:
            return replace(point, baseline=None, against=None)
        return replace(point, baseline=found[0].values, against=paired(found[0], point))

    return [held(point, found) for point, found in zip(grid, candidates(grid, settings, ignored), strict=True)]


def candidates(grid: list[Point], settings: Settings, ignored: Iterable[str]) -> list[list[Point]]:
    """For each point, all that have the baseline's values and otherwise equal it; itself alone if it has them."""
    wanted = flatten(settings.baseline)
    constant = {key: wanted[key] for key in unvaried(grid, settings) if has_throughout(grid, key, wanted[key])}
    filled = [constant | (configured(point) or {}) | point.values for point in grid]
    pairing = Pairing(filled, settings.baseline, ignored)
    return [
        [point] if pairing.is_one(values) else [grid[i] for i in pairing.of(values)]
        for point, values in zip(grid, filled, strict=True)
    ]


def configured(point: Point) -> dict[str, Any] | None:
    """What the config of the point's trials says of the baseline's keys; None before one is written."""
    return next((trial.config for trial in point.trials if trial.config is not None), None)


def unvaried(grid: list[Point], settings: Settings) -> list[str]:
    """The baseline's keys that no point of the grid sets."""
    varied = {key for point in grid for key in flatten(point.values)}
    return [key for key in flatten(settings.baseline) if key not in varied]


def has_throughout(grid: list[Point], key: str, value: Any) -> bool:
    """Whether every config that is written has `value` at `key`."""
    known = [config for point in grid if (config := configured(point)) is not None]
    return bool(known) and all(key in config and config[key] == value for config in known)


def baseline_note(grid: list[Point], labels: Labels, settings: Settings) -> str:
    """What to say when the experiment names a baseline and no point of the grid is one, or several are some point's."""
    if not settings.baseline:
        return ""
    if any(point.is_baseline for point in grid):
        held = zip(grid, candidates(grid, settings, settings.best_over), strict=True)
        without = [(point, ones) for point, ones in held if len(ones) != 1]
        if not without:
            return ""
        (first, ones), text = max(without, key=lambda pair: len(pair[1])), baseline_text(settings)
        rest = f", nor for {len(without) - 1} more" if len(without) > 1 else ""
        why = f"no point of the grid is {text} and else the same"
        if ones:
            several = listed([labels.point(one.values) for one in ones])
            why = f"{text} is any of {several}, and report.baseline doesn't say which"
        return f"No difference for {labels.point(first.values)}{rest}: {why}."
    keys, known = unvaried(grid, settings), [config for point in grid if (config := configured(point)) is not None]
    if keys and not known and all(point.mean is None for point in grid):
        return ""  # nothing has started, so that nobody knows
    said = f"No point of the grid is the baseline {baseline_text(settings)}: no differences."
    wanted = flatten(settings.baseline)
    for key in keys:
        found = list(dict.fromkeys(value_text(config[key]) for config in known if key in config))
        if found and all(config.get(key) != wanted[key] for config in known):
            said += f" The grid doesn't vary {key}, which is {listed(found)} in its trials."
    return said


def baseline_text(settings: Settings) -> str:
    return " ".join(f"{key}={value_text(value)}" for key, value in settings.baseline.items())
