"""Files of values that an experiment takes in: parts by name, and what `--part` lays over a whole experiment.

A part that `base` names lies under the experiment. One that the command line names lies over it, grid included, as if
its keys stood there as `key=value` before the user's own: `--part fast` is the same experiment in another size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gla_ablate.config import CHOICES
from gla_ablate.errors import ConfigError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SCALES = CONFIGS / "scale"  # parts that are made to be laid over an experiment, which need no folder before their name


def find_part(name: str, experiment: Path) -> Path:
    """The file that `base` names: `model/tiny` is `model/tiny.yaml` beside the experiment, or in `configs/`."""
    return _found(name, (experiment.parent, CONFIGS), f"{experiment}: base")


def find_scale(name: str, experiment: Path) -> Path:
    """The file that `--part` names: as `base` finds it, and `fast` is `scale/fast` too."""
    return _found(name, (experiment.parent, CONFIGS, SCALES), "--part")


def find_plugin(name: str, experiment: Path) -> Path:
    """The file that `plugins` names, relative to the experiment."""
    try:
        file = (experiment.parent / Path(name).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # of a home folder that there isn't
        raise ConfigError(f"plugins: got {name!r}: {error}") from error
    if not os.path.isfile(file):
        raise ConfigError(f"plugins: no such file {str(file)!r}")
    return file


def check_parts(names: Iterable[str], experiment: Path) -> None:
    """Raises `ConfigError` for a part that is laid twice, under whichever of its names."""
    seen = set()
    for name in names:
        if (file := find_scale(name, experiment).resolve()) in seen:
            raise ConfigError(f"--part: {name} stands twice")
        seen.add(file)


def called(name: str, parts: Iterable[str]) -> str:
    """What an experiment is called with `parts` over it, which keep their own folder: `gating-fast`."""
    return "-".join([name, *(re.sub(r"[^A-Za-z0-9._-]+", "_", Path(part).name) for part in parts)])


def spread(layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; a choice that is named stays whole, with its options (`CHOICES`), and an empty
    mapping stays, so that its key is checked."""
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        where = f"{prefix}{key}"
        whole = not isinstance(value, Mapping) or not value or (where in CHOICES and "name" in value)
        flat = _joined(flat, {where: value} if whole else spread(value, f"{where}."))
    return flat


def over(given: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys with `layer` after them. What `layer` replaces whole is gone, and so are the options of a choice
    that it names. An empty mapping replaces nothing."""
    kept = dict(given)
    for key in (key for key, value in layer.items() if value != {}):
        choice = key.removesuffix(".name") if key.removesuffix(".name") in CHOICES else None
        for old in given:
            option = choice and old.startswith(f"{choice}.") and old.removeprefix(f"{choice}.") not in CHOICES[choice]
            if option or old == key or old.startswith(f"{key}."):
                kept.pop(old, None)
    return _joined(kept, layer)


def _joined(given: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`given | layer`, but that an empty mapping takes no other's place."""
    return {**given, **{k: v for k, v in layer.items() if v != {} or not isinstance(given.get(k), Mapping)}}


def _found(name: str, folders: tuple[Path, ...], where: str) -> Path:
    for folder in folders:
        part = folder / f"{name}.yaml"
        if os.path.isfile(part):  # which takes a name that no file can have for one that none has
            return part
    known: set[str] = set()
    for folder in folders[1:]:
        known |= {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")}
    valid = ", ".join(sorted(known))
    raise ConfigError(f"{where}: no part {name!r}{nearest(name, known)} (valid: {valid}, or a file beside it)")
