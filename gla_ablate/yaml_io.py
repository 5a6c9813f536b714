"""Reading YAML as a user means it, with the place of every mistake.

PyYAML follows YAML 1.1, where `on` is a boolean, `1:30` the number 90, `010` the number 8 and `1e-3` a text, and lets a
repeated key win silently. Here scalars follow version 1.2 and a key stands once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from gla_ablate.errors import ConfigError, nearest

MOST = 1_000_000  # values of a file, those of an alias counted wherever it stands: ten lines can make billions of it


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count(node, {}) > MOST:
            problem = f"its aliases make more than {MOST:,} values of it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # which refuses an alias inside its own anchor

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values in it, an alias's as many times as it stands there."""
    if id(node) not in known:
        known[id(node)] = 1  # of one inside itself, which is refused later
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in inner)
    return known[id(node)]


_DIGITS = list("-+.0123456789")
for _tag, _scalar, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", _DIGITS),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", _DIGITS),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_scalar})$"), _first)


def parse_yaml(text: str) -> Any:
    """What `text` says. Raises `ConfigError` that begins with `line:column: `, both from 1."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{mark.line + 1}:{mark.column + 1}: " if mark else ""
        raise ConfigError(f"{place}{error.problem or error.context}") from error
    except RecursionError as error:
        raise ConfigError(" nested too deeply") from error
    # Of a tag that doesn't fit its value, `!!int x`, or a character that there isn't.
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ConfigError(f" {error}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(f"{line}:{column}: {error.reason}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. A `ConfigError` begins with the path, that of a syntax error with `path:line:column`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except FileNotFoundError as error:
        hint = nearest(path.name, (file.name for file in path.parent.glob("*.yaml")))
        raise ConfigError(f"{path}: no such file{hint}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    try:
        values = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}:{error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: takes a mapping of keys to values, got {type(values).__name__}")
    return values
