"""Names for classes whose options a YAML file can set: gates and data sources.

A registered class states its options as the keyword-only parameters of `__init__`, each with a type and a default.
That signature is the whole schema: validation, `--list-gates` and the resolved config of a trial read it here.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gla_ablate.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One option of a registered class: its annotated type and its default (`REQUIRED` when it has none)."""

    name: str
    type: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


class Registry(Generic[T]):
    """Maps a name to a class; `kind` is the word that error messages use ("gate", "data source")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. A second class under a name raises `ConfigError`; a reload of the same one doesn't."""

        def add(cls: type[T]) -> type[T]:
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(
                    f"{self.kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}"
                )
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        return sorted(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            hint = nearest(str(name), self._classes)
            raise ConfigError(f"unknown {self.kind} {name!r}{hint} (valid: {', '.join(self.names())})")
        return self._classes[name]

    def options(self, name: str) -> dict[str, Option]:
        """The options of `name` in the order of its signature. Raises `ConfigError` for types that can't be read."""
        init = self[name].__init__
        try:
            hints = typing.get_type_hints(init)
        except Exception as error:  # annotations are the class's own text, evaluated here
            raise ConfigError(f"{self.kind} {name!r}: its options have types that can't be read: {error}") from error
        return {
            p.name: Option(p.name, hints.get(p.name, Any), p.default)
            for p in inspect.signature(init).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def resolve(self, name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`given` checked against the options of `name` and completed with their defaults.

        `where` is the dotted key under which the options stand in the config ("model.gate"). Raises `ConfigError`
        that names the key, what was given and what is taken, also for a default that no `config.yaml` could hold.
        """
        options = self.options(name)
        for key in given:
            if key not in options:
                valid = ", ".join(options) or "no options"
                raise ConfigError(
                    f"{where}.{key}: {self.kind} {name!r} has no such option{nearest(key, options)} (it takes: {valid})"
                )
        resolved = {}
        for key, option in options.items():
            if key in given:
                resolved[key] = check_type(given[key], option.type, f"{where}.{key}")
            elif option.required:
                raise ConfigError(f"{where}.{key}: {self.kind} {name!r} needs it ({type_name(option.type)})")
            else:
                resolved[key] = check_default(option, f"{where}.{key}: the default of {self.kind} {name!r}")
        return resolved


def type_name(kind: Any) -> str:
    """A type as a user writes it: `int`, `list[int]`, `int | auto`."""
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, typing.get_args(kind)))
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def check_default(option: Option, key: str) -> Any:
    """The default of `option` as its type, or `ConfigError` that begins with `key`: a trial reads it from a file."""
    value = check_type(option.default, option.type, key)
    try:
        plain = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise ConfigError(f"{key}: got {value!r}, takes what YAML can write (a list for a tuple, a name for an object)")
    return value


def check_type(value: Any, kind: Any, key: str) -> Any:
    """`value` as `kind`, or `ConfigError` naming `key`. An int passes as a float, and so does a string that spells a
    number ("1e-3"); a bool is never a number."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for arm in args:
            try:
                return check_type(value, arm, key)
            except ConfigError:
                continue
    elif origin is typing.Literal:
        if any(value == arm and type(value) is type(arm) for arm in args):
            return value
        raise ConfigError(
            f"{key}: got {value!r}{nearest(str(value), map(str, args))} (valid: {', '.join(map(str, args))})"
        )
    elif origin is list:
        if isinstance(value, (list, tuple)):
            return [check_type(item, args[0], f"{key}[{i}]") for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return {k: check_type(item, args[1], f"{key}.{k}") for k, item in value.items()}
    elif kind is float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):  # a text that is no number, a whole number that no float reaches
                pass
    elif isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise ConfigError(f"{key}: got {value!r}, takes {type_name(kind)}")
