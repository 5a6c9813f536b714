"""What the command prints without running anything: the trials of a grid and the gates there are."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from gla_ablate.config import to_dict
from gla_ablate.data import build_source
from gla_ablate.experiment import Trial
from gla_ablate.launch.forecast import expected, makespan, past, rates, tokens
from gla_ablate.launch.slots import device_of
from gla_ablate.launch.view import clock
from gla_ablate.model import GATES, counter, state_size
from gla_ablate.registry import Option, type_name

TRACED = 64  # different models whose memory is told


def print_trials(trials: list[Trial], console: Console, out: Path, slots: list[dict[str, str]]) -> None:
    """A row per trial: parameters, numbers carried from token to token in one sequence, the memory that training takes,
    tokens, steps, and the time, judged by the trials under `out` that finished on a device like that of `slots`."""
    device = device_of(slots[0])
    known = past(out, device)
    rate = rates(trials) if known else {}
    parameters = counter()
    memory, untraced = _memory(trials, "CUDA_VISIBLE_DEVICES" in slots[0])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", overflow="fold")
    for name in ("parameters", "state", "memory", "tokens", "steps", *(["time"] if known else [])):
        table.add_column(name, justify="right", no_wrap=True)
    total, durations, unknown = 0, list[float](), 0
    for trial in trials:
        config, count = trial.config, tokens(trial)
        total += count
        size = parameters(config.model, build_source(config.data).vocab_size)
        state = state_size(config.model, config.data["seq_len"])
        cells = [f"{size:,}", f"{state:,}", memory.get(trial.id, "–"), f"{count:,}"]
        cells.append(f"{config.trainer.max_steps:,}")
        if known:
            steps = config.trainer.max_steps
            seconds = expected(rate[trial.id] * count / steps, steps, known)
            durations += [] if seconds is None else [seconds]
            unknown += seconds is None
            cells.append("–" if seconds is None else clock(seconds))
        table.add_row(trial.id, *cells)
    console.print(table)
    console.print(f"{len(trials)} trials, {total:,} tokens; nothing was started", highlight=False)
    console.print("memory: weights, gradients, optimiser, activations; libraries come on top", highlight=False)
    for text in untraced.values():
        console.print(f"memory of {text}", highlight=False, markup=False)
    if durations:
        whole = clock(makespan([], durations, len(slots)))
        rest = f", and {unknown} trials unlike any that has run" if unknown else ""
        judges = f"judged by {len(known)} that finished on {device}"
        console.print(f"about {whole} with {len(slots)} at a time{rest}, {judges}", highlight=False)
    else:
        console.print(f"how long they take is told once one like them has finished on {device}", highlight=False)


def _memory(trials: list[Trial], gpu: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Of each trial, as text: of as many different ones as are traced in some ten seconds. And why some can't be, a
    line for each reason."""
    import torch

    from gla_ablate.compilation import resolve_compile, resolve_recompute
    from gla_ablate.memory import Untraced, training_bytes
    from gla_ablate.stamp import has_bf16

    kind = "cuda" if gpu else "cpu"
    automatic = has_bf16(kind)
    found: dict[str, str] = {}
    texts: dict[str, str] = {}
    untraced: dict[str, str] = {}
    for trial in trials:
        config = trial.config
        precision = config.trainer.precision
        bf16 = precision.startswith("bf16") or (precision == "auto" and automatic)
        vocab_size = build_source(config.data).vocab_size
        key = json.dumps(
            [
                to_dict(config)["model"],
                vocab_size,
                config.data["batch_size"],
                config.data["seq_len"],
                precision,
                config.trainer.accumulate,
                config.trainer.processes,
                config.trainer.strategy,
                resolve_recompute(config, resolve_compile(config, vocab_size, torch.device(kind))),
            ]
        )
        if key not in texts:
            if len(texts) == TRACED:
                continue
            try:
                texts[key] = f"{math.ceil(training_bytes(config, vocab_size, kind, bf16) / 2**20):,} MiB"
            except Untraced as why:
                texts[key] = "–"
                # of models that fail alike, but for the shapes in the message, one is told
                alike = re.sub(r"\d+", "#", str(why))
                untraced.setdefault(alike, f"{trial.id} isn't known, since its step can't be traced: {why}")
        found[trial.id] = texts[key]
    return found, untraced


def print_gates(console: Console) -> None:
    """Every registered gate, plugins included: name, options with defaults, shape of its decay, formula, source."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("gate and its options", overflow="fold", min_width=max(len(name) for name in GATES.names()))
    table.add_column("decay", no_wrap=True)
    table.add_column("formula and source", overflow="fold")
    for name in GATES.names():
        gate = GATES[name]
        options = [f"  {_spell(option)}" for option in GATES.options(name).values()]
        table.add_row("\n".join([name, *options]), gate.decay_shape, f"{gate.formula}\n{gate.source}".rstrip())
    console.print(table, markup=False)


def _spell(option: Option) -> str:
    default = "" if option.required else f" = {option.default}"
    return f"{option.name}: {type_name(option.type)}{default}"
