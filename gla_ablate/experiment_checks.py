"""What an experiment says of its own grid, checked when it is loaded: each begins its message with the key."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from gla_ablate.config import Config, merge
from gla_ablate.errors import ConfigError, nearest
from gla_ablate.grid import MISSING, Axis, lookup, matches, points, spell
from gla_ablate.interpolation import Interpolate
from gla_ablate.pairing import Pairing, filled

METRICS = (
    "val/loss",
    "val/ppl",
    "val/bpb",
    "val/accuracy",
    "train/loss",
    "train/grad_norm",
    "train/tokens_per_s",
    "train/data_wait_ms",
    "train/mfu",
    "lr",
)
AT_LENGTH = re.compile(r"eval/(?:loss|accuracy)_at_([1-9]\d*)x")  # the multiple of data.seq_len
SETTING = re.compile(r"val/accuracy/(\w+)")  # one of those that a task validates
GATE = re.compile(r"gate/layer(\d+)/head(\d+)/(forget|memory)")  # as `gate_statistics.GateStatistics` logs them


def length_tag(measure: str, multiple: int) -> str:
    """The tag, `AT_LENGTH`, of an evaluation on rows of `multiple · seq_len` tokens; `measure`: loss or accuracy."""
    return f"eval/{measure}_at_{multiple}x"


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
        raise ConfigError(
            f"name: got {name!r}, takes letters, digits, '-', '_' and '.', and stays in the output folder"
        )


def check_metric(tag: str) -> None:
    known = tag in METRICS or AT_LENGTH.fullmatch(tag) or SETTING.fullmatch(tag)
    if not (known or GATE.fullmatch(tag)):
        valid = (
            f"{', '.join(METRICS)}, eval/loss_at_4x and the like, val/accuracy/…, gate/layer0/head0/memory or forget"
        )
        raise ConfigError(f"report.metric: no such metric {tag!r}{nearest(tag, METRICS)} (valid: {valid})")


def is_better_large(tag: str) -> bool:
    """Whether a metric is good where it is large, as far as that can be said of it."""
    return "accuracy" in tag or tag in ("train/tokens_per_s", "train/mfu")


def check_metric_of(tag: str, configs: list[Config]) -> None:
    """That every trial logs the metric, if it is of a layer's gate or an evaluation at another length. Raises
    `ConfigError`."""
    if gate := GATE.fullmatch(tag):
        from gla_ablate.model.kinds import mixers  # here, since it imports torch

        layer, head = int(gate[1]), int(gate[2])
        for model in (config.model for config in configs):
            gated = [i for i, kind in enumerate(mixers(model)) if kind == "gla"]
            if layer not in gated or head >= model.heads:
                layers = ", ".join(map(str, gated)) or "none"
                raise ConfigError(
                    f"report.metric: got {tag}, and of a trial's layers (gated: {layers}) and heads (0 to "
                    f"{model.heads - 1}) that is none"
                )
    found = AT_LENGTH.fullmatch(tag)
    if found and any(int(found[1]) not in config.eval.lengths for config in configs):
        raise ConfigError(f"report.metric: got {tag}, takes a length that eval.lengths of every trial has")


def check_logged(tag: str, configs: list[Config]) -> None:
    """That the data of every trial log the metric: tasks accuracy, and of each setting that they validate its own, text
    bits per byte. Raises `ConfigError`."""
    from gla_ablate.data import build_source  # here, since it imports torch

    accuracy, setting = "accuracy" in tag, SETTING.fullmatch(tag)
    for config in configs if accuracy or tag == "val/bpb" else ():
        source = build_source(config.data)
        of_text = source.bytes_per_token is not None
        if accuracy == of_text:
            valid = "val/loss, val/ppl, val/bpb" if of_text else "val/loss, val/ppl, val/accuracy"
        elif setting and setting[1] not in source.val_settings:
            settings = ", ".join(f"val/accuracy/{name}" for name in source.val_settings)
            valid = settings or "val/accuracy: it has one setting"
        else:
            continue
        raise ConfigError(f"report.metric: got {tag}, which data {config.data['name']} doesn't log (valid: {valid})")


def check_seeds(seeds: list[int]) -> list[int]:
    if not seeds:
        raise ConfigError("seeds: empty list, takes at least one")
    for i, seed in enumerate(seeds):
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seeds[{i}]: got {seed}, takes a whole number from 0 to 4294967295")
        if seed in seeds[:i]:
            raise ConfigError(f"seeds: {seed} stands twice")
    return seeds


def check_conditions(
    values: dict[str, Any],
    axes: list[Axis],
    exclude: list[dict[str, Any]],
    baseline: dict[str, Any],
    interpolate: Interpolate,
) -> None:
    """Every entry of `exclude` and the baseline hit some point of the grid as it stands in the file, the baseline by
    values as they are written there, which is what the report compares."""
    conditions = {f"exclude[{i}]": condition for i, condition in enumerate(exclude)}
    if baseline:
        conditions["report.baseline"] = baseline
    grid = [interpolate(merge(values, point)) for point in points(axes)] if conditions else []
    for where, condition in conditions.items():
        for key in condition:
            if all(lookup(point, key) is MISSING for point in grid):
                known = {k for point in grid for k in dotted(point)}
                raise ConfigError(f"{where}.{key}: no such key{nearest(key, known)}")
        if not any(matches(point, condition) for point in grid):
            raise ConfigError(f"{where}: {{{spell(condition)}}} matches no point of the grid")
    if baseline:
        laid = list(zip(points(axes), grid, strict=True))
        pairing = Pairing([filled(point, baseline, functools.partial(dict, v)) for point, v in laid], baseline)
        ones = pairing.found.values()
        if not ones:
            raise ConfigError(f"report.baseline: {{{spell(baseline)}}} is no point as the grid writes it")
        left = [[laid[i][0] for i in one if not any(matches(laid[i][1], e) for e in exclude)] for one in ones]
        if several := next((one for one in left if len(one) > 1), None):
            first, second = map(spell, several[:2])
            raise ConfigError(
                f"report.baseline: {{{spell(baseline)}}} is both {{{first}}} and {{{second}}}; takes what tells them "
                "apart, written out in the grid as well"
            )


def check_best_over(best_over: list[str], baseline: dict[str, Any], factors: list[str]) -> None:
    """What each variant is at its best over is varied by the grid, and is not what the baseline fixes."""
    where = "report.best_over"
    fixed = dotted(baseline)
    for i, key in enumerate(best_over):
        if key not in factors:
            varied = ", ".join(factors) or "nothing"
            raise ConfigError(f"{where}: the grid doesn't vary {key!r}{nearest(key, factors)} (it varies: {varied})")
        if key in best_over[:i]:
            raise ConfigError(f"{where}: {key} stands twice")
        if any(other == key or other.startswith(f"{key}.") for other in fixed):
            raise ConfigError(f"{where}: report.baseline fixes {key}, the best of which is to be found")


def check_equal(over: str, tolerance: float, best_over: list[str], factors: list[str], usual: float) -> None:
    """What is expected to be equal is varied by the grid, and not chosen by how it comes out. `usual` is the tolerance
    where none is given."""
    where = "report.expect_equal"
    if not over and tolerance != usual:
        raise ConfigError(f"{where}.over: missing, takes a key that the grid varies")
    if not 0 < tolerance < 1:
        raise ConfigError(f"{where}.tolerance: got {tolerance}, takes a share of the metric between 0 and 1")
    if over and over not in factors:
        varied = ", ".join(factors) or "nothing"
        raise ConfigError(f"{where}.over: the grid doesn't vary {over!r}{nearest(over, factors)} (it varies: {varied})")
    if over in best_over:
        raise ConfigError(f"{where}.over: {over} is in report.best_over, too: its best value or none, not both")


def check_used(given: list[dict[str, Any]], configs: list[Config]) -> None:
    """Every option of a kind of layer that is set belongs to a layer of some trial. `given` are the values of the
    trials before `resolve`, which drops what a model doesn't have. Raises `ConfigError`."""
    from gla_ablate.model.kinds import KEYS, OPTIONS  # here, so that a mistyped file needn't wait for torch

    for kind, keys in KEYS.items():
        for key, unset in keys.items():
            if key not in OPTIONS or any(getattr(config.model, key) != unset for config in configs):
                continue
            for value in (values["model"][key] for values in given):
                if value != unset:
                    raise ConfigError(f"model.{key}: got {str(value).lower()}, of {kind} layers, which no trial has")


def dotted(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All dotted keys of nested mappings, those of the mappings included."""
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += dotted(value, f"{prefix}{key}.")
    return keys
