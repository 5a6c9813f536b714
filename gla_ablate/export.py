"""A trial's weights for use elsewhere: a folder with `model.safetensors`, `config.yaml` and `export.json`.

The weights are those of the last checkpoint, fp32, under their names in `LanguageModel`; what several names share (tied
embeddings) is there once, under the first. The file's metadata repeat the config as JSON, so that it means something
without the folder. `export.json` says which tokens the model reads, and where it comes from.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gla_ablate.config import to_dict, write_config
from gla_ablate.data.packing import SEPARATOR
from gla_ablate.errors import ConfigError
from gla_ablate.loading import CONFIG, RECORD, WEIGHTS, Trained, open_folder, own_weights, sha256
from gla_ablate.status import sync, write_json

KEPT = ("git", "versions", "precision", "data", "plugin")  # of a stamp; the rest tells of the machine


def export(folder: Path, to: Path | None = None) -> Path:
    """Write the export of `folder`, a trial's or an exported one, to `to`, or to `export` inside it; the folder.

    Each file is replaced in one step, `export.json` last, with the sha256 of the weights: after an export that was
    killed in between, loading says that the files don't belong together. Raises `ConfigError` for a folder without
    usable weights, and for a place where something else would be overwritten.
    """
    trained = open_folder(folder)
    place = to or folder / "export"
    check_place(place, given=to is not None)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to: {place}: {(error.strerror or str(error)).lower()}") from error
    config = to_dict(trained.config)
    told = {"format": "pt", "config": json.dumps(config), "step": str(trained.step)}
    write_weights(own_weights(trained.model), told, place / WEIGHTS)
    write_config(trained.config, place / CONFIG)
    write_json(place / RECORD, record(trained, place / WEIGHTS))
    return place


def check_place(place: Path, given: bool) -> None:
    """That nothing but an earlier export would be overwritten there. Raises `ConfigError`."""
    check_link(place, given)
    if (place / RECORD).exists() or is_export(place / WEIGHTS):  # one that was killed has no record yet
        return
    for name in (CONFIG, WEIGHTS):
        if (place / name).exists():
            raise ConfigError(f"{place}: has a {name} that is of no export; name another folder with --to")


def is_export(weights: Path) -> bool:
    """Whether `export` wrote this file, by its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            return {"config", "step"} <= (file.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def check_link(place: Path, given: bool) -> None:
    """That only a place that the user has `given` is a symbolic link. Raises `ConfigError`."""
    if place.is_symlink() and not given:
        raise ConfigError(f"{place}: is a symbolic link, and nothing is written where one leads (--to may be one)")


def write_weights(weights: dict[str, Tensor], told: dict[str, str], path: Path) -> None:
    """Replace `path` in one step, on the disk when this returns."""
    from safetensors.torch import save_file

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    try:
        unfinished.touch()  # with the rights that a new file gets here, whatever the library gives it
        rights = unfinished.stat().st_mode
        save_file({name: whole(x) for name, x in weights.items()}, unfinished, told)
        unfinished.chmod(rights)
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def whole(x: Tensor) -> Tensor:
    """`x` with memory of its own, which the format asks for."""
    own = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if own else x.clone(memory_format=torch.contiguous_format)


def record(trained: Trained, weights: Path) -> dict[str, Any]:
    """What `export.json` holds."""
    tokens: dict[str, Any] = {"size": trained.model.embedding.num_embeddings}
    if trained.reads_bytes:
        tokens |= {"tokens": "bytes", "separator": SEPARATOR[0]}  # the latter between documents
    else:
        tokens |= {"tokens": trained.config.data["name"]}
    kept = {key: trained.record[key] for key in KEPT if key in trained.record}
    return {"step": trained.step, "vocabulary": tokens, "sha256": sha256(weights), **kept}
