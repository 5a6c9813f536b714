"""`${…}` in a configuration, in OmegaConf's grammar: another key (`${model.dim}`), an environment variable
(`${oc.env:HOME}`), one inside another (`${optim.${oc.env:WHICH}}`).

OmegaConf resolves, but takes milliseconds for a whole configuration, of which a grid has thousands. So for each value
that holds a `${…}` it is given what that could name, nothing else, and the same once; a bare key of a number is looked
up.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gla_ablate.errors import ConfigError
from gla_ablate.grid import lookup

Path = tuple[Any, ...]  # keys, from the outermost
Interpolate = Callable[[Mapping[str, Any]], dict[str, Any]]

BARE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\}")
# A `${`, the dots of a relative reference, what is written of its key, and what stands behind that.
REFERENCE = re.compile(r"\$\{\s*(\.*)([^\s:}$\[]*)\s*(?=(.?))", re.DOTALL)


def interpolate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with every `${…}` replaced by what it names. Raises `ConfigError` for one that names nothing,
    or itself."""
    return interpolator()(values)


def interpolator() -> Interpolate:
    """`interpolate` for the many points of one grid: what it has resolved it knows, the environment included."""
    known: dict[str, Any] = {}

    def interpolate(values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[Path, Any] = {}
        copied = _copy(values, (), found)
        for path, value in found.items():
            made = _number(values, value)
            if made is None:
                part = _part(values, found, path)
                name = repr((path, part))
                if name not in known:
                    known[name] = _resolved(part, path)
                made = copy.deepcopy(known[name])
            _put(copied, path, made)
        return copied

    return interpolate


def _number(values: Mapping[str, Any], text: Any) -> int | float | None:
    """What `text` names if it is a bare key, and that of a number."""
    key = BARE.fullmatch(text) if isinstance(text, str) else None
    found = lookup(values, key[1]) if key else None
    return found if isinstance(found, int | float) else None


def _copy(values: Mapping[str, Any], at: Path, found: dict[Path, Any]) -> dict[str, Any]:
    """`values`, whose place is `at`; adds to `found` the texts with a `${…}`, and whole the lists that hold one."""
    copied: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            copied[key] = _copy(value, (*at, key), found)
        else:
            if _refers(value):
                found[*at, key] = value
            copied[key] = copy.deepcopy(value) if isinstance(value, list) else value
    return copied


def _refers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_refers, value.values()))
    if isinstance(value, list):
        return any(map(_refers, value))
    return isinstance(value, str) and "${" in value


def _part(values: Mapping[str, Any], found: Mapping[Path, Any], path: Path) -> dict[str, Any]:
    """Of `values` the one that was `found` at `path`, and all that it could name, directly or by others."""
    part: dict[str, Any] = {}
    seen, todo = {path}, [path]
    while todo:
        at = todo.pop()
        _put(part, at, found[at])
        for text in _texts(found[at]):
            for dots, keys in _references(text):
                taken = _take(values, at[: max(len(at) - dots, 0)] if dots else keys, part)
                inside = [p for p in found if taken is not None and p[: len(taken)] == taken and p not in seen]
                seen.update(inside)
                todo += inside
    return part


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


@functools.cache
def _references(text: str) -> list[tuple[int, Path]]:
    """Of each `${…}` in `text`, inner ones too, how many levels up it begins, and the keys that it surely begins with:
    `(0, ("model", "dim"))` for `${model.dim}`, `(0, ("model",))` for `${model.${x}}`."""
    found: list[tuple[int, Path]] = []
    for dots, written, behind in REFERENCE.findall(text):
        keys = tuple(filter(None, written.split(".")))
        if behind == ":":
            if written == "oc.env":  # names no key
                continue
            keys = ()  # of other resolvers, anything may be named
        elif behind == "$":
            keys = keys if written.endswith(".") else keys[:-1]
        found.append((len(dots), keys))
    return found


def _take(values: Mapping[str, Any], path: Path, part: dict[str, Any]) -> Path | None:
    """Put into `part` what `values` have at `path`, or where the way there ends in a text or a list; that place, or
    None for nothing."""
    found: Any = values
    for depth, key in enumerate(path):
        if not isinstance(found, Mapping):
            path = path[:depth]
            break
        if key not in found:
            return None
        found = found[key]
    if path:
        _put(part, path, found)
    else:
        part.update(values)
    return path


def _put(values: dict[str, Any], path: Path, value: Any) -> None:
    *outer, last = path
    for key in outer:
        values = values.setdefault(key, {})
    values[last] = value


def _resolved(part: dict[str, Any], path: Path) -> Any:
    """What the value of `part` at `path` becomes."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(part), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError(f"{'.'.join(map(str, path))}: references nested too deeply") from error
    return functools.reduce(lambda inner, key: inner[key], path, resolved)
