"""A trained model from its folder: a trial's, or one that `export` wrote. What holds weights runs no code.

a trial's       config.yaml, stamp.json,  checkpoints/last.ckpt
an export       config.yaml, export.json, model.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gla_ablate.checkpoint import Unusable, last, read_checkpoint
from gla_ablate.config import Config, ModelConfig, fill, located, resolve_model
from gla_ablate.data.corpus import ByteCorpus
from gla_ablate.data.source import DATA
from gla_ablate.errors import ConfigError
from gla_ablate.model import LanguageModel, build_model, check_model, plugin_sha256
from gla_ablate.ops import resolve_backend
from gla_ablate.stamp import has_bf16
from gla_ablate.status import read_json
from gla_ablate.trial import is_finished
from gla_ablate.yaml_io import read_yaml

CONFIG, WEIGHTS, RECORD = "config.yaml", "model.safetensors", "export.json"  # of an exported folder
PREFIX = "model."  # of the network's weights inside a checkpoint, which is of the LightningModule


@dataclass(frozen=True)
class Trained:
    """A model with its weights, in eval mode, and what its folder says of it."""

    model: LanguageModel
    config: Config  # `data` as given: nothing says that the data are on this machine
    record: dict[str, Any]  # of an export; of a trial its stamp, {} if that is missing
    step: int  # after which the weights were saved
    notes: list[str]  # what isn't as it was

    @property
    def reads_bytes(self) -> bool:
        """Whether its tokens are the bytes of text."""
        return issubclass(DATA[self.config.data["name"]], ByteCorpus)

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU that computes in it, if the trial trained so; else nothing changes."""
        kind = self.model.embedding.weight.device.type
        trained_so = self.record.get("precision", self.config.trainer.precision) != "32-true"
        return torch.autocast(kind, torch.bfloat16, enabled=trained_so and has_bf16(kind))


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    plugins: Iterable[str | os.PathLike[str]] | None = None,
) -> LanguageModel:
    """The trained model of a trial's folder or of an exported one, in eval mode, its weights fp32 on `device`.

    Weights are data and run no code. The Python files that config.yaml names under `plugins` are imported, as training
    did, for their gates; `plugins` takes the place of that list, if a file has moved or none shall be imported (`[]`).
    Warns if the gate's file isn't the one that was trained with. Raises `ConfigError` (a `ValueError`) that names the
    file and what to do.
    """
    trained = open_folder(Path(folder), device, plugins)
    for note in trained.notes:
        warnings.warn(note, stacklevel=2)
    return trained.model


def open_folder(
    folder: Path, device: torch.device | str = "cpu", plugins: Iterable[str | os.PathLike[str]] | None = None
) -> Trained:
    """As `load`, with what the folder says of the model."""
    config = read_folders_config(folder, plugins)
    exported = (folder / WEIGHTS).is_file()
    path = folder / WEIGHTS if exported else last(folder)
    if not path.is_file():
        trial = "" if (folder / RECORD).is_file() else f"; python run.py {folder} trains on until there is one"
        raise ConfigError(f"{folder}: no weights here, neither checkpoints/last.ckpt nor {WEIGHTS}{trial}")
    again = "export it again"
    if not exported:
        again = f"python run.py {folder} runs the trial again"
        if is_finished(folder):  # which is left as it is
            again += ", in a folder again1, again2, … inside it, which then is the one to name here"
    record = read_json(folder / (RECORD if exported else "stamp.json")) or {}
    try:
        weights, made_with, step = read_export(path, record) if exported else read_trials(path)
        check_architecture(config, made_with)
        model = build_model(runnable(config.model, device), vocabulary(config), config.seed)
        fill_in(model, weights)
    except Unusable as error:
        raise ConfigError(f"{path}: {error}; {again}") from error
    gate, trained_with = config.model.gate["name"], record.get("plugin")
    changed = trained_with is not None and plugin_sha256(gate) != trained_with
    notes = [f"not as it was: the file of gate {gate!r} has changed since {folder} was trained"] if changed else []
    return Trained(model.to(device).eval(), config, record, step, notes)


def read_folders_config(folder: Path, plugins: Iterable[str | os.PathLike[str]] | None) -> Config:
    """What its config.yaml says, the plugins imported. The data needn't be there."""
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        such = f", such as {inside[0].parent}" if inside else ""
        what = "no config.yaml here" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {what}; takes the folder of a trial, runs/EXPERIMENT/TRIAL, or an export{such}")
    values = read_yaml(path)
    if plugins is not None:
        values["plugins"] = [os.fspath(file) for file in plugins]
    with located(path):
        try:
            config = resolve_model(values)
        except ConfigError as error:
            if plugins is None and str(error).startswith("plugins: no such file"):
                raise ConfigError(f"{error}; write there where it is (in Python: load(FOLDER, plugins=[…]))") from error
            raise
        name = config.data.get("name")
        if not isinstance(name, str) or name not in DATA:
            raise ConfigError(f"data.name: got {name!r}, takes one of {', '.join(DATA.names())}")
        vocabulary(config)
    return config


Read = tuple[dict[str, Tensor], Any, int]  # weights by their names in the model, the config that they are of, the step


def read_trials(path: Path) -> Read:
    """Of a trial's checkpoint. Raises `Unusable`."""
    checkpoint = read_checkpoint(path)
    try:
        weights = {name.removeprefix(PREFIX): x for name, x in checkpoint["state_dict"].items()}
        return weights, checkpoint["config"], int(checkpoint["global_step"])
    except Exception as error:  # of any kind, as in `read_checkpoint`
        raise Unusable(f"it is no checkpoint of a trial ({type(error).__name__})") from error


def read_export(path: Path, record: dict[str, Any]) -> Read:
    """Of an exported file, whose bytes are those that `record` tells of. Raises `Unusable`."""
    from safetensors import safe_open

    digest = sha256(path)
    if record.get("sha256", digest) != digest:
        raise Unusable(f"it isn't the file that {RECORD} tells of")
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return weights, json.loads(told["config"]), int(told["step"])
    except Exception as error:  # of any kind, as in `read_checkpoint`
        raise Unusable(f"it is no export of this package ({type(error).__name__})") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_architecture(config: Config, made_with: Any) -> None:
    """That weights of the config `made_with` are such as `config` describes. Raises `Unusable`."""
    try:
        theirs, data = fill(ModelConfig, made_with["model"]), made_with["data"]["name"]
        differ = differences(config.model, check_model(theirs))
    except ConfigError as error:
        raise Unusable(f"it is of another version of this package ({error})") from error
    except Exception as error:
        raise Unusable(f"it doesn't say which model it is of ({type(error).__name__})") from error
    if data != config.data["name"]:
        differ.append(f"data.name {data}")
    if differ:
        raise Unusable(f"it is of another model than {CONFIG} beside it, with {', '.join(differ)}")


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """The keys, with their values, in which `theirs` is another model; what changes speed alone is none."""
    first, second = (asdict(replace(config, chunk_size="auto", backend="auto")) for config in (ours, theirs))
    return [f"model.{key} {second[key]}" for key in first if first[key] != second[key]]


def runnable(config: ModelConfig, device: torch.device | str) -> ModelConfig:
    """`config` with a backend that `device` has: it changes speed alone, and the trial may have run elsewhere."""
    try:
        resolve_backend(config.backend, device)
    except ValueError:
        return replace(config, backend="auto")
    return config


def vocabulary(config: Config) -> int:
    """How many words its data have, told without the data: of bytes always as many, of a task as it was given."""
    size = getattr(DATA[config.data["name"]], "vocab_size", config.data.get("vocab_size"))
    if type(size) is not int or size < 1:
        raise ConfigError(f"data.vocab_size: got {size!r}, takes a whole number from 1")
    return size


def own_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The state dict, but what several names share (tied embeddings, parameters that gates share) under the first."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, x in state.items():
        names.setdefault(id(x), name)
    return {name: state[name].detach() for name in names.values()}


def fill_in(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Copy `weights` into `model`. Raises `Unusable` unless they are its own, with or without second names."""
    every, own = model.state_dict(), own_weights(model)
    differ = sorted(own.keys() - weights.keys()) + sorted(weights.keys() - every.keys())
    differ += [name for name, x in weights.items() if name in every and not alike(x, every[name])]
    if differ:
        raise Unusable(f"its weights have other names, shapes or types than {CONFIG} says ({differ[0]})")
    with torch.no_grad():
        for name, x in weights.items():
            every[name].copy_(x)


def alike(x: object, y: Tensor) -> bool:
    return isinstance(x, Tensor) and (x.shape, x.dtype, x.layout) == (y.shape, y.dtype, y.layout)
