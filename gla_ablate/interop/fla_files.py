"""The folder of a `GLAForCausalLM` as `save_pretrained` writes it: config.json, and safetensors, one file or several.

Nothing here runs code from it; weights that are pickled (pytorch_model.bin) aren't read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gla_ablate.errors import ConfigError
from gla_ablate.status import read_json

SETTINGS, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises `ConfigError`."""
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = "no config.json here" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {what}; takes one that GLAForCausalLM.save_pretrained wrote") from error
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: got {type(settings).__name__}, takes a mapping")
    return settings


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Of the folder's safetensors, one file or several with an index. Raises `ConfigError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        if path.is_file():
            return load_file(path)
        path = folder / INDEX
        if not path.is_file():
            raise ConfigError(f"{folder}: no {WEIGHTS} here, nor an index of several; save_pretrained writes them")
        weights: dict[str, Tensor] = {}
        for name in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
            path = folder / Path(name).name
            weights |= load_file(path)
        return weights
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: can't be read ({error})") from error


def check_free(place: Path) -> None:
    """That there is no other model in `place` than one of FLA's GLA. Raises `ConfigError`."""
    settings = read_json(place / SETTINGS)
    theirs = isinstance(settings, dict) and settings.get("model_type") == "gla"
    for name in (SETTINGS, WEIGHTS):
        if (place / name).exists() and not theirs:
            raise ConfigError(f"{place}: has a {name} that is of no GLAForCausalLM; name another folder")
