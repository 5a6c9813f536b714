"""Which point of a grid another is held against. The report's differences and `match: params` mean the same one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gla_ablate.config import CHOICES
from gla_ablate.grid import MISSING, flatten, lookup


def filled(point: Mapping[str, Any], baseline: Mapping[str, Any], values: Callable[[], Any]) -> dict[str, Any]:
    """`point` with those of the baseline's keys that it doesn't set, as they stand in its whole configuration; `values`
    gives that, and is asked only if there are any."""
    own = flatten(point)
    missing = [key for key in flatten(baseline) if key not in own]
    whole = values() if missing else {}
    return {key: value for key in missing if (value := lookup(whole, key)) is not MISSING} | dict(point)


COMMON = frozenset(f"{choice}.{option}" for choice, options in CHOICES.items() for option in options)


class Pairing:
    """Of `points`, each a mapping of factors to values, with those among them that have the values of `baseline`.

    A baseline that sets a `name` (`model.gate.name: none`) frees that mapping's other entries too, for they are options
    of the name and travel with it; but for those that every name has, such as `data.seq_len`. Factors in `ignored`
    don't have to be equal.
    """

    def __init__(
        self, points: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any], ignored: Iterable[str] = ()
    ) -> None:
        self.wanted = flatten(baseline)
        self.families = tuple(key.removesuffix("name") for key in self.wanted if key.endswith(".name"))
        self.ignored = frozenset(ignored)
        self.found: dict[str, list[int]] = {}
        for i, point in enumerate(points):
            if self.is_one(point):
                self.found.setdefault(self._rest(point), []).append(i)

    def is_one(self, point: Mapping[str, Any]) -> bool:
        """Whether `point` has the baseline's values, as the grid writes them."""
        flat = flatten(point)
        return all(key in flat and flat[key] == value for key, value in self.wanted.items())

    def of(self, point: Mapping[str, Any]) -> list[int]:
        """Which of the points have the baseline's values and otherwise equal `point`."""
        return self.found.get(self._rest(point), [])

    def _rest(self, point: Mapping[str, Any]) -> str:
        """What a point shares with its baseline, equal for equal content in any order."""
        flat = flatten({factor: value for factor, value in point.items() if factor not in self.ignored})
        left = {
            k: v for k, v in flat.items() if k not in self.wanted and (k in COMMON or not k.startswith(self.families))
        }
        return json.dumps(left, sort_keys=True, default=str)
