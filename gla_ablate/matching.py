"""`match: params`: models of one grid with as many parameters, so that what differs is what the grid varies.

A gate brings parameters of its own. Here the rest of the model gives them up, or takes them: the SwiGLU's width, or
with `match: {params: model.dim}` the model's width first and the SwiGLU's for what is then left. The measure is the
report's baseline: every point gets as many parameters as the point that has the baseline's values and else its own;
without a baseline, as many as the YAML's first point with the same data. All parameters count, embeddings too, and
those of the measure as if it had the point's vocabulary: that the data bring more words makes no model narrower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any

from gla_ablate.config import CHOICES, RULES, Config, ModelConfig, located, merge, resolve, to_dict
from gla_ablate.errors import ConfigError, nearest
from gla_ablate.grid import Row, flatten, matches, spell
from gla_ablate.interpolation import Interpolate
from gla_ablate.pairing import Pairing, filled

FFN = ("model.ffn_ratio", "model.ffn_multiple")
WIDTHS = {"model.ffn_ratio": FFN, "model.dim": ("model.dim", *FFN)}  # what is solved for → the keys that it sets
SIZES = CHOICES["data"]  # of the data: how much is read, not what
SLACK = 0.005  # of the parameters: two models that are both this near to a third are within 1 % of each other
SEARCHED = 4.0  # times the width, and a fourth of it


def solved_for(match: str | Mapping[str, str] | None) -> str | None:
    """The key that an experiment's `match` solves for; None without. Raises `ConfigError` for anything else."""
    if match is None:
        return None
    wanted = {match: "model.ffn_ratio"} if isinstance(match, str) else dict(match)
    if list(wanted) != ["params"]:
        raise ConfigError(f"match: got {match!r}, takes params, or {{params: KEY}} (KEY: {', '.join(WIDTHS)})")
    key = wanted["params"]
    if key not in WIDTHS:
        raise ConfigError(f"match.params: got {key!r}{nearest(key, WIDTHS)} (valid: {', '.join(WIDTHS)})")
    return key


def check_free(key: str, varied: Set[str]) -> None:
    """Raises `ConfigError` if what is to be solved for is among the keys that the grid has `varied`."""
    for taken in WIDTHS[key]:
        if taken in varied:
            others = [other for other in WIDTHS if not varied & set(WIDTHS[other])]
            instead = f"; match: {{params: {others[0]}}} would leave it" if others else ""
            raise ConfigError(f"match: solves for {taken}, which the grid varies{instead}")


def check_unreferenced(key: str, laid: Iterable[dict[str, Any]], interpolate: Interpolate) -> None:
    """Raises `ConfigError` if another value of the points, as they are `laid`, refers to what is solved for: it would
    be that of the width before."""
    solved = WIDTHS[key]
    for given in laid:
        before = flatten(interpolate(given))
        try:
            moved = flatten(interpolate(merge(given, dict.fromkeys(solved, "solved for"))))
            refers = next((k for k, v in before.items() if k not in solved and repr(moved.get(k)) != repr(v)), None)
        except ConfigError as error:  # of a reference whose name is one
            refers = str(error).partition(":")[0]
        if refers:
            raise ConfigError(f"match: solves for {key}, which {refers} refers to, so that it would keep the old value")


class Measures:
    """Which model each point of a grid shall be like.

    `points` are those of the grid as its YAML lays it out, before the command line fixes an axis and before any is
    excluded; `lay` gives their values, `everywhere` is what the command line sets in all of them, and `made` the models
    of those that are known by their numbers. So a point's model is the same, and a finished trial of it is found again,
    whatever part of the grid is run. Only where several could be the baseline does it count which are excluded.
    """

    def __init__(
        self, points: list[Row], baseline: Mapping[str, Any], exclude: list[dict[str, Any]],
        lay: Callable[[Row], dict[str, Any]], everywhere: Mapping[str, Any], interpolate: Interpolate,
        made: Mapping[int, ModelConfig],
    ) -> None:  # fmt: skip
        self.points, self.baseline, self.exclude, self.everywhere = points, baseline, exclude, everywhere
        self.lay, self.interpolate = lay, interpolate
        self.pairing = Pairing([filled(point, baseline, partial(self.config, point)) for point in points], baseline)
        self.first: dict[str, int] = {}
        for i, point in enumerate(points):
            self.first.setdefault(task(point), i)
        self.made = dict(made)

    def of(self, point: Row, config: Config, values: Mapping[str, Any]) -> ModelConfig:
        """Of one point, which `values` were laid for. Raises `ConfigError` for a measure that is no model."""
        if not self.pairing.wanted:
            return self.model(self.first.get(task(point), 0))
        known = filled(point, self.baseline, lambda: to_dict(config))
        if self.pairing.is_one(known):
            return config.model
        found = self.pairing.of(known)
        if len(found) > 1:
            found = [i for i in found if not self.is_excluded(i)]
        if len(found) == 1:
            return self.model(found[0])
        return self.resolved(merge(merge(values, self.baseline), self.everywhere), f"the baseline of {spell(point)}")

    def model(self, i: int) -> ModelConfig:
        if i not in self.made:
            others = "is the baseline of others" if self.pairing.wanted else "is the measure without a report.baseline"
            self.made[i] = self.resolved(self.lay(self.points[i]), f"{spell(self.points[i])}, which {others}")
        return self.made[i]

    def resolved(self, values: Mapping[str, Any], what: str) -> ModelConfig:
        with located(f"match: {what}"):
            return resolve(self.interpolate(values)).model

    def config(self, point: Row) -> dict[str, Any]:
        """Of a point of the YAML's; of one that is no trial, and excluded for that perhaps, what is laid for it."""
        values = self.interpolate(self.lay(point))
        try:
            return to_dict(resolve(values))
        except ConfigError:
            return values

    def is_excluded(self, i: int) -> bool:
        values = self.interpolate(self.lay(self.points[i]))
        return any(matches(values, condition) for condition in self.exclude)


def task(point: Row) -> str:
    """What a point sets of the data that isn't a matter of how many."""
    data = {k: v for k, v in flatten(point).items() if k.startswith("data.") and k.removeprefix("data.") not in SIZES}
    return json.dumps(data, sort_keys=True, default=str)


def matched(grid: list[tuple[Row, Config]], measured: list[ModelConfig], key: str) -> list[Config]:
    """The config of each point, its model with as many parameters as its measure would have for the point's own data,
    to within `SLACK`. Raises `ConfigError` for a model that can't be made so."""
    from gla_ablate.data import build_source  # here, and below, so that a mistyped file needn't wait for torch
    from gla_ablate.model import counter

    count = counter()
    solved: dict[Any, ModelConfig] = {}
    configs = []
    for (point, config), measure in zip(grid, measured, strict=True):
        vocab_size = build_source(config.data).vocab_size
        target = count(measure, vocab_size)
        name = repr(config.model), vocab_size, target

        def size(model: ModelConfig, vocab_size: int = vocab_size) -> int:
            return count(model, vocab_size)

        if name not in solved:
            try:
                solved[name] = solve(config.model, key, target, size)
            except ConfigError as error:
                raise ConfigError(f"{error} (at {spell(point)})") from error
        configs.append(replace(config, model=solved[name]))
    return configs


def solve(model: ModelConfig, key: str, target: int, count: Callable[[ModelConfig], int]) -> ModelConfig:
    """`model` with `target` parameters, as `count` counts them, to within `SLACK`; itself if it has them already."""
    if key == "model.dim" and abs(count(model) - target) > SLACK * target:
        model = with_dim(model, target, count)
    return with_ffn(model, target, count)


def with_dim(model: ModelConfig, target: int, count: Callable[[ModelConfig], int]) -> ModelConfig:
    """The width among those that the heads allow at which there are nearly as many parameters as wanted."""
    from gla_ablate.model import check_model
    from gla_ablate.model.kinds import check_mixers, mixers
    from gla_ablate.model.shapes import MAX_HEAD_DIM

    def allowed(dim: int) -> bool:
        widths = [dim * model.expand_k, dim * model.expand_v]
        whole = all(abs(width - round(width)) < 1e-6 and round(width) % model.heads == 0 for width in widths)
        if "gla" in mixers(model) and (not whole or max(widths) > MAX_HEAD_DIM * model.heads):
            return False
        try:
            check_mixers(replace(model, dim=dim))
        except ConfigError:  # of a head of an odd width
            return False
        return True

    dims = [dim for dim in range(math.ceil(model.dim / SEARCHED), int(model.dim * SEARCHED) + 1) if allowed(dim)]
    low, high = 0, len(dims) - 1
    while low < high:  # parameters rise with the width
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(replace(model, dim=dims[middle])) < target else (low, middle)
    near = dims[max(low - 1, 0) : low + 1]
    return check_model(min((replace(model, dim=dim) for dim in near), key=lambda made: abs(count(made) - target)))


def with_ffn(model: ModelConfig, target: int, count: Callable[[ModelConfig], int]) -> ModelConfig:
    """The SwiGLU's width that gives as many parameters, in multiples of the largest power of two that does."""
    from gla_ablate.model.shapes import ffn_width

    present, width = count(model), ffn_width(model)
    if abs(present - target) <= SLACK * target:
        return model
    each = count(of_ffn(model, width + 1, 1)) - present  # what one more of it brings
    wanted, multiple = width + (target - present) / each, model.ffn_multiple
    _, possible = RULES["model.ffn_ratio"]
    while True:
        near = round(wanted / multiple) * multiple
        if near > 0 and possible(near / model.dim) and abs(present + (near - width) * each - target) <= SLACK * target:
            return of_ffn(model, near, multiple)
        if multiple == 1:
            raise ConfigError(
                f"match: no width of the SwiGLU gives this point {target:,} parameters, as the one that it is matched "
                f"to has: {unmatched(target, present - width * each, each, wanted / model.dim)}; what helps is a "
                "report.baseline at each size that the grid varies, another model.ffn_ratio, or leaving match out"
            )
        multiple = 1 << ((multiple - 1).bit_length() - 1)  # the power of two below


def unmatched(target: int, rest: int, each: int, ratio: float) -> str:
    """Why a model with `rest` parameters beside its SwiGLU, and `each` for each unit of its width, can't have `target`
    with one of `ratio` times the model's width."""
    if rest >= target:
        return f"it has too many, {rest:,} without a SwiGLU"
    if ratio > 1 and not RULES["model.ffn_ratio"][1](ratio):
        return f"it has too few, {rest:,} without a SwiGLU, which would be {ratio:,.0f} times as wide as the model"
    return f"each unit of the width brings {each:,}"


def of_ffn(model: ModelConfig, width: int, multiple: int) -> ModelConfig:
    """`model` with a SwiGLU of that width, a multiple of `multiple`."""
    from gla_ablate.model.shapes import ffn_width

    made = replace(model, ffn_ratio=width / model.dim, ffn_multiple=multiple)
    if ffn_width(made) != width:  # width / dim · dim, in floats, may be a little more, and is rounded up
        made = replace(made, ffn_ratio=math.nextafter(made.ffn_ratio, 0))
    return made
