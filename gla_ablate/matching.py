"""`match: params`: models of one grid with as many parameters, so that what differs is what the grid varies.

A gate brings parameters of its own. Here the rest of the model gives them up, or takes them: the SwiGLU's width, or
with `match: {params: model.dim}` the model's width first and the SwiGLU's for what is then left. The measure is the
report's baseline: every point gets as many parameters as the point that has the baseline's values and else its own;
without a baseline, as many as the grid's first point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any

from gla_ablate.config import Config, ModelConfig, interpolate, merge, resolve, to_dict
from gla_ablate.errors import ConfigError, nearest
from gla_ablate.grid import Row, matches, spell

FFN = ("model.ffn_ratio", "model.ffn_multiple")
WIDTHS = {"model.ffn_ratio": FFN, "model.dim": ("model.dim", *FFN)}  # what is solved for → the keys that it sets
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


def measures(grid: list[tuple[Row, Config]], laid: list[dict[str, Any]], baseline: Mapping[str, Any]) -> list[Config]:
    """For each point of the grid the config that it is to be like: of the one point that has the baseline's values and
    else the same, or where there isn't one, it is excluded, say, what the baseline's values make of those that were
    `laid` for the point."""
    if not baseline:
        return [grid[0][1]] * len(grid)
    own = [matches(to_dict(config), baseline) for _, config in grid]
    rests = [json.dumps(rest(point, baseline), sort_keys=True, default=str) for point, _ in grid]
    ones: dict[str, list[Config]] = {}
    for like, is_one, (_, config) in zip(rests, own, grid, strict=True):
        if is_one:
            ones.setdefault(like, []).append(config)

    found = []
    for like, is_one, (point, config), values in zip(rests, own, grid, laid, strict=True):
        near = [config] if is_one else ones.get(like, [])
        if len(near) != 1:
            try:
                near = [resolve(interpolate(merge(values, baseline)))]
            except ConfigError as error:
                raise ConfigError(f"match: the baseline of {spell(point)}: {error}") from error
        found += near
    return found


def rest(point: Row, baseline: Mapping[str, Any]) -> Row:
    """The factors of a point that the baseline leaves alone: neither set by it, whole or in part, nor an option of a
    name that it sets."""
    families = tuple(key.removesuffix("name") for key in baseline if key.endswith(".name"))

    def is_set(factor: str) -> bool:
        return any(f"{key}.".startswith(f"{factor}.") or f"{factor}.".startswith(f"{key}.") for key in baseline)

    return {key: value for key, value in point.items() if not (is_set(key) or key.startswith(families))}


def matched(grid: list[tuple[Row, Config]], measured: list[Config], key: str) -> list[Config]:
    """The config of each point, its model with as many parameters as the one of its measure, to within `SLACK`. Raises
    `ConfigError` for a model that can't be made so."""
    from gla_ablate.data import build_source  # here, and below, so that a mistyped file needn't wait for torch
    from gla_ablate.model import counter

    count = counter()
    solved: dict[Any, ModelConfig] = {}
    configs = []
    for (point, config), measure in zip(grid, measured, strict=True):
        vocab_size = build_source(config.data).vocab_size
        target = count(measure.model, build_source(measure.data).vocab_size)
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
    from gla_ablate.model.shapes import MAX_HEAD_DIM

    def allowed(dim: int) -> bool:
        widths = [dim * model.expand_k, dim * model.expand_v]
        whole = all(abs(width - round(width)) < 1e-6 and round(width) % model.heads == 0 for width in widths)
        return whole and max(widths) <= MAX_HEAD_DIM * model.heads

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
    while True:
        near = round(wanted / multiple) * multiple
        if near > 0 and abs(present + (near - width) * each - target) <= SLACK * target:
            return of_ffn(model, near, multiple)
        if multiple == 1:
            raise ConfigError(
                f"match: {target:,} parameters would take a SwiGLU of width {wanted:,.0f} in place of {width:,}"
            )
        multiple = 1 << ((multiple - 1).bit_length() - 1)  # the power of two below


def of_ffn(model: ModelConfig, width: int, multiple: int) -> ModelConfig:
    """`model` with a SwiGLU of that width, a multiple of `multiple`."""
    from gla_ablate.model.shapes import ffn_width

    made = replace(model, ffn_ratio=width / model.dim, ffn_multiple=multiple)
    if ffn_width(made) != width:  # width / dim · dim, in floats, may be a little more, and is rounded up
        made = replace(made, ffn_ratio=math.nextafter(made.ffn_ratio, 0))
    return made
