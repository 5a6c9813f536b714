"""The arguments of `run.py`, and which of them go with which."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gla_ablate.errors import ConfigError, nearest
from gla_ablate.launch.slurm_options import slurm_option

LAUNCHERS = ("local", "ray", "slurm")
FORMATS = ("gla_ablate", "fla")
# What goes with a command on one folder; nothing else does, and they with nothing else.
COMPANIONS = {
    "generate": ("prompt", "prompt_file", "tokens", "temperature", "top_k", "top_p", "seed"),
    "export": ("to", "format"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see python run.py --help)")


def parser() -> argparse.ArgumentParser:
    made = _Parser(prog="run.py", description="Run a grid of trials and report on it.", allow_abbrev=False)
    made.add_argument(
        "experiment", nargs="?", type=Path, help="a YAML such as experiments/quickstart.yaml, or one trial's folder"
    )
    made.add_argument("overrides", nargs="*", metavar="key=value", help="in every trial; it fixes an axis of the grid")
    made.add_argument(
        "--part",
        action="append",
        default=[],
        metavar="NAME",
        help="a file of values over the experiment, before key=value, such as fast; results in a folder of its own",
    )
    made.add_argument("--jobs", type=_from(1), help="trials at a time (default: one per GPU, else 2; 32 of SLURM's)")
    made.add_argument("--per-gpu", type=_from(1), metavar="N", help="trials at a time on each GPU (default: 1)")
    made.add_argument(
        "--launcher",
        type=_launcher,
        default="local",
        metavar="local|ray|slurm",
        help="where trials run (default: local)",
    )
    made.add_argument(
        "--slurm",
        action="append",
        type=slurm_option,
        default=[],
        metavar="key=value",
        help="of each trial's job, such as partition=gpu",
    )
    made.add_argument("--out", type=Path, help="folder of all experiments (default: runs)")
    made.add_argument("--retry-failed", action="store_true", help="also trials that failed by a fault of their own")
    made.add_argument(
        "--max-retries", type=_from(0), default=0, metavar="N", help="how often a trial that was killed starts again"
    )
    made.add_argument("--fail-fast", action="store_true", help="end the grid with the first trial that fails")
    made.add_argument(
        "--frozen", action="store_true", help="refuse to run a package with changes that are not committed"
    )
    instead = made.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print every trial and what it costs, start nothing")
    instead.add_argument(
        "--prepare", action="store_true", help="make the folders of the trials and print them, for torchrun or srun"
    )
    instead.add_argument("--status", action="store_true", help="print how each trial stands, start nothing")
    instead.add_argument("--report", action="store_true", help="write the report of what has run, start nothing")
    instead.add_argument("--list-gates", action="store_true", help="print the gates, an experiment's plugins included")
    instead.add_argument("--generate", type=Path, metavar="RUN_FOLDER", help="go on with a text, by a trained trial")
    instead.add_argument("--export", type=Path, metavar="RUN_FOLDER", help="write a trial's weights (safetensors)")
    text = made.add_argument_group("with --generate")
    prompt = text.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="to go on with (default: none, which begins a document)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a file, or - for standard input")
    text.add_argument("--tokens", type=_from(1), metavar="N", help="at most (default: 200); a document may end before")
    text.add_argument("--temperature", type=_temperature, metavar="X", help="0: always the likeliest (default: 1)")
    text.add_argument("--top-k", type=_from(1), metavar="N", help="draw from the N likeliest tokens alone")
    text.add_argument("--top-p", type=_probability, metavar="P", help="draw from the likeliest that make up P together")
    text.add_argument("--seed", type=_from(0), metavar="N", help="of what is drawn (default: 0)")
    weights = made.add_argument_group("with --export")
    weights.add_argument(
        "--to", type=Path, metavar="DIR", help="where to (default: RUN_FOLDER/export, or RUN_FOLDER/fla)"
    )
    weights.add_argument(
        "--format",
        type=_format,
        metavar="gla_ablate|fla",
        help="for this package (default), or for flash-linear-attention's GLAForCausalLM.from_pretrained",
    )
    return made


def _from(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,6}", text) or int(text) < least:
            most = ", below a million" if text.isdecimal() and len(text) > 6 else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, takes a whole number from {least}{most}")
        return int(text)

    return whole_number


def _temperature(text: str) -> float:
    return _number(text, lambda x: 0 <= x < math.inf, "a number from 0")


def _probability(text: str) -> float:
    return _number(text, lambda x: 0 < x <= 1, "a number above 0, to 1")


def _number(text: str, allows: Callable[[float], bool], takes: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allows(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, takes {takes}")
    return value


def _launcher(text: str) -> str:
    if text not in LAUNCHERS:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes local, ray or slurm{nearest(text, LAUNCHERS)}")
    return text


def _format(text: str) -> str:
    if text not in FORMATS:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes gla_ablate or fla{nearest(text, FORMATS)}")
    return text


def check_company(given: argparse.Namespace) -> None:
    """That what goes with --generate or --export alone, or not with them, stands so. Raises `ConfigError`."""
    usual = vars(parser().parse_args([]))
    present = [name for name, value in vars(given).items() if value != usual[name]]
    for command, companions in COMPANIONS.items():
        here = command in present
        for name in present:
            if here and name not in (command, *companions):
                shown = {"experiment": str(given.experiment), "overrides": "key=value"}.get(name, flag(name))
                raise ConfigError(f"{shown}: doesn't go with --{command}, which takes a trial's folder alone")
            if not here and name in companions:
                raise ConfigError(f"{flag(name)}: goes with --{command} RUN_FOLDER alone")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_prompt(given: argparse.Namespace) -> bytes:
    """The bytes of --prompt or --prompt-file; empty without either. Raises `ConfigError` for a file without."""
    if given.prompt_file is None:
        return os.fsencode(given.prompt or "")  # also bytes that aren't UTF-8
    if given.prompt_file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(given.prompt_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"--prompt-file: {given.prompt_file}: {(error.strerror or str(error)).lower()}") from error
