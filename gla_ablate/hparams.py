"""A trial's configuration as TensorBoard's HParams tab takes it: flat keys, of one type each, the same in every trial.

HParams hides a run that lacks a key or types it otherwise. So what may be one type or another (`chunk_size`: a number
or auto; `max_time`: a number or nothing; `mixer`: a name or several) is text everywhere, and the options that only some
gates or data sources have are one text together.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable

from gla_ablate.config import Config

# With the options that have a key of their own: those of `config.CHOICES` that the schema gives a value, too.
CHOICES = {"model.gate": (), "data": ("seq_len", "batch_size")}


def flat_hparams(config: Config) -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {"seed": config.seed}
    for choice, value in {"model.gate": config.model.gate, "data": config.data}.items():
        flat[choice] = value["name"]
        flat |= {f"{choice}.{key}": value[key] for key in CHOICES[choice]}
        rest = {key: x for key, x in value.items() if key not in ("name", *CHOICES[choice])}
        flat[f"{choice}_options"] = ", ".join(f"{key}={x}" for key, x in rest.items())
    for part in (config.model, config.optim, config.trainer, config.eval):
        types = typing.get_type_hints(type(part))
        name = type(part).__name__.removesuffix("Config").lower()
        for key, value in vars(part).items():
            if not isinstance(value, dict):
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                flat[f"{name}.{key}"] = value if types[key] in (bool, int, float, str) else text
    return flat


def column_types() -> dict[str, type]:
    """Of every key of `flat_hparams`."""
    return {key: type(value) for key, value in flat_hparams(Config()).items()}


def columns_of(keys: Iterable[str]) -> list[str]:
    """The keys of `flat_hparams` that hold the dotted `keys` of a config."""

    def column(key: str) -> str:
        choice = next((choice for choice in CHOICES if key.startswith(f"{choice}.")), None)
        if choice is None:
            return key
        option = key.removeprefix(f"{choice}.")
        return choice if option == "name" else key if option in CHOICES[choice] else f"{choice}_options"

    return list(dict.fromkeys(map(column, keys)))
