"""How factors and numbers are written: values without JSON, names no longer than it takes to tell points apart."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from gla_ablate.grid import flatten

TAG_LABELS = {  # in the order in which charts follow each other
    "val/loss": "validation loss (nats/token)",
    "val/accuracy": "validation accuracy (fraction)",
    "val/bpb": "validation bits per byte",
    "val/ppl": "validation perplexity",
    "train/loss": "training loss (nats/token)",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_s": "throughput (tokens/s)",
    "train/mfu": "model FLOPs utilisation",
    "train/data_wait_ms": "waiting for data (ms/step)",
    "lr": "learning rate",
    "eval/loss_by_position": "loss by position in the longest rows (nats/token)",
    "eval/accuracy_by_position": "accuracy by position in the longest rows",
}

UNCHANGED = "unchanged"  # from what the experiment sets for all trials
NAMED = 3  # things that a sentence names


def value_text(value: Any, hide: frozenset[str] = frozenset(), names: Mapping[str, str] | None = None) -> str:
    """A factor's value as text: `{"name": "data_dependent", "rank": 16}` is `data_dependent rank=16`.

    `hide` are options of a mapping to leave out, `names` what to call others, by their values alone where empty; else
    nested options are dotted. A mapping that says nothing (more) leaves all `unchanged`.
    """
    if isinstance(value, Mapping):
        options = flatten(value)
        said = [str(options.pop("name"))] if "name" in options else []
        for key, option in options.items():
            name = (names or {}).get(key, key)
            said += [f"{name}={value_text(option)}" if name else value_text(option)] * (key not in hide)
        return " ".join(said) or UNCHANGED
    if isinstance(value, list):
        return ",".join(map(value_text, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def identity(value: Any) -> str:
    """A hashable stand-in for a factor's value or a whole point: equal for equal content in any order of keys."""
    return json.dumps(value, sort_keys=True)


class Labels:
    """Names for the points of one grid: what varies is said, what doesn't is left to `constants`.

    A factor with one value, and an option that is the same wherever its `name` occurs, tells nothing apart.
    """

    def __init__(self, factors: list[str], points: list[dict[str, Any]]) -> None:
        self.points = points
        self.varying = [f for f in factors if len({identity(p.get(f)) for p in points}) > 1]
        self.fixed = [f for f in factors if f not in self.varying]
        self.headers = short_names(factors)
        self._hidden = {f: constant_options([p.get(f) for p in points]) for f in factors}
        self._names = {f: option_names([p.get(f) for p in points]) for f in factors}

    def cell(self, factor: str, point: dict[str, Any]) -> str:
        """The value of `factor` at `point`, short."""
        value = point.get(factor)
        if not isinstance(value, Mapping):
            return value_text(value)
        return value_text(value, self._hidden[factor][name_of(value)], self._names[factor])

    def point(self, point: dict[str, Any]) -> str:
        """One line that tells `point` from all others: `data_dependent · heads=4`; of a part of one, that part."""
        parts = []
        for factor in self.varying:
            if factor not in point:
                continue
            cell = self.cell(factor, point)
            says_itself = (isinstance(point.get(factor), Mapping) and cell != UNCHANGED) or factor.endswith(".name")
            parts.append(cell if says_itself else f"{self.headers[factor]}={cell}")
        return " · ".join(parts) or "the only point"

    def constants(self) -> list[str]:
        """What `cell` and `point` leave out: `heads=4`, `data_dependent rank=16`."""
        texts = [f"{self.headers[f]}={value_text(self.points[0].get(f))}" for f in self.fixed if self.points]
        for factor in self.varying:
            for value in (p.get(factor) for p in self.points):
                if isinstance(value, Mapping) and (hidden := self._hidden[factor][name_of(value)]):
                    shown = {key: v for key, v in flatten(value).items() if key == "name" or key in hidden}
                    texts.append(value_text(shown))
        return list(dict.fromkeys(texts))


def name_of(value: Mapping[str, Any]) -> str:
    return str(value.get("name", ""))


def constant_options(values: Iterable[Any]) -> dict[str, frozenset[str]]:
    """name → its options that have one and the same value wherever that name occurs; of a mapping without a name beside
    others that have one none, for they alone tell it apart."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for value in values:
        if isinstance(value, Mapping):
            seen.setdefault(name_of(value), []).append(flatten(value))
    return {
        name: frozenset(
            key
            for key in uses[0]
            if key != "name" and (name or len(seen) == 1) and all(key in u and u[key] == uses[0][key] for u in uses)
        )
        for name, uses in seen.items()
    }


def option_names(values: Iterable[Any]) -> dict[str, str]:
    """Dotted options of mappings → what to call them: `gate.rank` is `rank`, and `gate.name`, if it is the only name
    among them, needs none, for its value says it."""
    keys = list(dict.fromkeys(key for value in values if isinstance(value, Mapping) for key in flatten(value)))
    names = [key for key in keys if key.endswith(".name")]
    return short_names(keys) | (dict.fromkeys(names, "") if len(names) == 1 else {})


def short_names(factors: list[str]) -> dict[str, str]:
    """Dotted key → its last part, or as many last parts as tell it from the others; `x.gate.name` is `gate`."""
    parts = {f: f.removesuffix(".name").split(".") for f in factors}
    names = {}
    for factor, own in parts.items():
        length = next(
            (n for n in range(1, len(own)) if all(p[-n:] != own[-n:] for f, p in parts.items() if f != factor)),
            len(own),
        )
        names[factor] = ".".join(own[-length:])
    return names


def listed(names: list[str]) -> str:
    """`a, b, c and 4 more`."""
    shown, more = names[:NAMED], len(names) - NAMED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def si(number: float | None, digits: int = 3) -> str:
    """`number` to `digits` significant digits with k, M, G, T or P; nothing for None."""
    if number is None:
        return ""
    rounded = float(f"{number:.{digits}g}")
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(rounded) >= size:
            return f"{rounded / size:#.{digits}g}".rstrip(".") + unit
    return f"{rounded:g}"


def decimals(means: Iterable[float | None], stds: Iterable[float | None]) -> int:
    """Digits after the point for a column of means: four significant ones of the largest mean, and two of the usual
    (median) std where there is one; at most 6."""
    sizes = [abs(m) for m in means if m]
    spreads = [s for s in stds if s]
    wanted = [3 - exponent(max(sizes))] if sizes else []
    wanted += [1 - exponent(statistics.median_low(spreads))] if spreads else []
    return min(max([*wanted, 0]), 6)


def exponent(number: float) -> int:
    """Of the power of ten at or below `number` > 0."""
    return math.floor(math.log10(number))


def signed(number: float, places: int) -> str:
    """With its sign and a true minus; a rounded zero has none."""
    text = fixed(number, places)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def fixed(number: float, places: int) -> str:
    """With a true minus, which a rounded zero doesn't have."""
    text = f"{abs(number):.{places}f}"
    return f"−{text}" if number < 0 and float(text) != 0 else text
