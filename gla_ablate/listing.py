"""What the command prints without running anything: the trials of a grid and the gates there are."""

from __future__ import annotations

import functools
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from gla_ablate.config import ModelConfig, to_dict
from gla_ablate.data import build_source
from gla_ablate.experiment import Trial
from gla_ablate.model import GATES, count_parameters, state_size
from gla_ablate.registry import Option, type_name


def print_trials(trials: list[Trial], console: Console) -> None:
    """A row per trial: parameters, numbers in the recurrent state of one sequence, tokens it trains on, steps."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", overflow="fold")
    for name in ("parameters", "state", "tokens", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    params = _cached_by_model()
    total = 0
    for trial in trials:
        config = trial.config
        tokens = config.trainer.max_steps * config.data["batch_size"] * config.data["seq_len"]
        total += tokens
        numbers = (params(trial), state_size(config.model), tokens, config.trainer.max_steps)
        table.add_row(trial.id, *(f"{number:,}" for number in numbers))
    console.print(table)
    console.print(f"{len(trials)} trials, {total:,} tokens; nothing was started", highlight=False)


def _cached_by_model() -> Callable[[Trial], int]:
    """`count_parameters` of a trial's model, counted once for trials that differ in the seed or the optimiser alone."""
    models: dict[str, ModelConfig] = {}

    @functools.cache
    def count(key: str, vocab_size: int) -> int:
        return count_parameters(models[key], vocab_size)

    def parameters(trial: Trial) -> int:
        key = str(to_dict(trial.config)["model"])
        models[key] = trial.config.model
        return count(key, build_source(trial.config.data).vocab_size)

    return parameters


def print_gates(console: Console) -> None:
    """Every registered gate, plugins included: name, formula, shape of its decay, options with defaults, source."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("gate", no_wrap=True)
    for name in ("formula", "decay", "options", "source"):
        table.add_column(name, overflow="fold")
    for name in GATES.names():
        gate = GATES[name]
        options = "\n".join(_spell(option) for option in GATES.options(name).values())
        table.add_row(name, gate.formula, gate.decay_shape, options or "–", gate.source)
    console.print(table, markup=False)


def _spell(option: Option) -> str:
    default = "" if option.required else f" = {option.default}"
    return f"{option.name}: {type_name(option.type)}{default}"
