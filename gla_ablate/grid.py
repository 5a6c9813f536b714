"""A grid as data: axes that are crossed, rows of keys that vary together, conditions that leave points out.

An axis is a list of rows; a row gives dotted keys their values. `grid: {model.heads: [2, 4]}` is the axis
`[{"model.heads": 2}, {"model.heads": 4}]`, and an entry of `zip` an axis whose rows have several keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gla_ablate.config import CHOICES, merge
from gla_ablate.errors import ConfigError

Row = dict[str, Any]
Axis = list[Row]

MISSING = object()
MOST = 1_000_000  # points of a grid: more are a mistake, and would take hours to be checked


def build_axes(grid: Mapping[str, list[Any]], zips: list[dict[str, list[Any]]]) -> list[Axis]:
    """The axes of an experiment in the order of its YAML, `grid` before `zip`.

    Raises `ConfigError` for an axis without values, lists of unequal length in one `zip` and a key on two axes, be it
    inside a mapping: one axis would undo the other, and folders and reports would name a value that no trial had. Also
    for more than `MOST` points.
    """
    axes = []
    seen: dict[str, str] = {}
    for where, columns in [("grid", {k: v}) for k, v in grid.items()] + [(f"zip[{i}]", z) for i, z in enumerate(zips)]:
        for key, values in columns.items():
            if not values:
                raise ConfigError(f"{where}.{key}: empty list, takes at least one value")
            for varied in sorted({key}.union(*(leaves(key, value) for value in values))):
                if varied in seen:
                    inside = "" if varied == key else f" varies {varied},"
                    raise ConfigError(f"{where}.{key}:{inside} already varied by {seen[varied]}")
                seen[varied] = where
        lengths = {key: len(values) for key, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"{where}: lists of unequal length ({', '.join(f'{k} {n}' for k, n in lengths.items())})")
        axes.append([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
    if (count := math.prod(map(len, axes))) > MOST:
        raise ConfigError(f"grid: makes {count:,} points, takes up to {MOST:,}")
    return [axis for axis in axes if axis]


def leaves(key: str, value: Any) -> set[str]:
    """The dotted keys that `key: value` sets."""
    return set(flatten({key: value}))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys, in order."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def points(axes: list[Axis]) -> Iterator[Row]:
    """The cross product of `axes`, the last varying fastest. Without axes one empty point."""
    for rows in itertools.product(*axes):
        yield {key: value for row in rows for key, value in row.items()}


def fix(axis: Axis, key: str, value: Any) -> Axis:
    """The rows of `axis` that agree with `key = value`, or, if none does, all rows with that value put in.

    An axis that `key` doesn't touch comes back whole. `key` may lie inside an axis' values: `model.gate.name = none`
    picks `{name: none}` from an axis of gates.
    """
    changed = []
    for row in axis:
        tree = merge(merge({}, row), {key: value})
        changed.append({k: lookup(tree, k, default=old) for k, old in row.items()})
    agreeing = [row for row, new in zip(axis, changed, strict=True) if row == new]
    return agreeing or [row for i, row in enumerate(changed) if row not in changed[:i]]


def touches(axes: list[Axis], key: str, value: Any) -> bool:
    """Whether `key = value` sets what an axis varies, or an option of a choice whose name one varies."""
    varied = {leaf for axis in axes for row in axis for k, v in row.items() for leaf in leaves(k, v)}
    for leaf in leaves(key, value):
        if any(f"{leaf}.".startswith(f"{other}.") or f"{other}.".startswith(f"{leaf}.") for other in varied):
            return True
        for choice, common in CHOICES.items():
            inside, option = leaf.startswith(f"{choice}."), leaf.removeprefix(f"{choice}.")
            if inside and f"{choice}.name" in varied and option not in common:
                return True
    return False


def lookup(values: Mapping[str, Any], key: str, default: Any = MISSING) -> Any:
    """The value under a dotted key of nested mappings."""
    found: Any = values
    for part in str(key).split("."):
        if not isinstance(found, Mapping) or part not in found:
            return default
        found = found[part]
    return found


def matches(values: Mapping[str, Any], condition: Mapping[str, Any]) -> bool:
    """Whether `values` agree with every dotted key of `condition`; a mapping in it may leave options out."""
    for key, wanted in condition.items():
        found = lookup(values, key)
        if isinstance(wanted, Mapping) and isinstance(found, Mapping):
            if not matches(found, wanted):
                return False
        elif found != wanted:
            return False
    return True


def spell(row: Mapping[str, Any]) -> str:
    """A row as a user would write it: `model.gate={name: none}, model.heads=2`."""
    return ", ".join(f"{key}={_flow(value)}" for key, value in row.items()) or "the only point"


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
