"""`--slurm key=value`: what may be asked of sbatch for each trial's job. What isn't asked here, sbatch takes from
`SBATCH_…` variables of the environment."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterable
from typing import Any

from gla_ablate.errors import ConfigError, nearest

NUMBERS = ("time", "cpus_per_task", "gpus_per_node", "signal_delay_s")  # time in minutes
WORDS = (
    "partition", "account", "qos", "constraint", "mem", "mem_per_cpu", "mem_per_gpu", "gres", "nodelist", "exclude",
    "comment", "dependency", "mail_type", "mail_user", "wckey",
)  # fmt: skip
CLUSTER = "cluster"  # slurm, or local: submitit's stand-in on this machine
TAKEN = (*NUMBERS, *WORDS, CLUSTER)
MINUTES = 240  # of a job, after which it is requeued and goes on
DELAY = 90  # seconds before that in which a trial is told to save
EARLY = 60  # seconds by which SLURM may tell it even earlier
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")  # beginnings of variables
SBATCH = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}  # names of variables that differ


def slurm_option(text: str) -> tuple[str, Any]:
    """`"time=60"` → `("time", 60)`. Raises argparse's error for a key or a value that isn't taken."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ArgumentTypeError(f"got {text!r}, takes key=value")
    if key not in TAKEN:
        raise ArgumentTypeError(f"no such key {key!r}{nearest(key, TAKEN) or ', takes ' + ', '.join(sorted(TAKEN))}")
    if key in NUMBERS and not (value.isdigit() and int(value)):
        unit = " of minutes" if key == "time" else ""
        raise ArgumentTypeError(f"{key}: got {value!r}, takes a whole number{unit} from 1")
    if key == CLUSTER and value not in ("slurm", "local"):
        raise ArgumentTypeError(f"{key}: got {value!r}, takes slurm or local")
    return key, int(value) if key in NUMBERS else value


def complete(given: Iterable[tuple[str, Any]], threads: int | None, devices: int = 1) -> dict[str, Any]:
    """The options with what isn't given: the time, and a CPU for each of the trial's `threads`, or of its `devices`.
    Raises `ConfigError` for jobs that would be told to save before they begin, or that have fewer GPUs than devices. A
    job is one task, whatever the trial starts in it."""
    usual: dict[str, Any] = {
        "time": MINUTES,
        "signal_delay_s": DELAY,
        "cpus_per_task": threads or devices,
        CLUSTER: "slurm",
    }
    options = usual | dict(given)
    if options.get("gpus_per_node", devices) < devices:
        raise ConfigError(
            f"--slurm gpus_per_node: got {options['gpus_per_node']}, takes at least {devices} (trainer.devices)"
        )
    if 60 * options["time"] <= options["signal_delay_s"] + EARLY:
        raise ConfigError(
            f"--slurm time: got {options['time']} minutes, so a trial might be told to save and end at once, "
            f"signal_delay_s ({options['signal_delay_s']}) and up to {EARLY} seconds before its time is up"
        )
    return options


def not_for_jobs(environment: Iterable[str], options: Iterable[str]) -> list[str]:
    """Which variables jobs must not inherit: those of a job that run.py itself runs in, whose resources they aren't to
    have, and of sbatch's, which go before what a script asks for, those of the `options` and of what every job has."""
    asked = {f"SBATCH_{SBATCH.get(key, key.upper())}" for key in (*options, "array", "signal", "requeue", "no_requeue")}
    return [
        name
        for name in environment
        if name in asked or (name.startswith(OF_A_JOB) and name not in ("SLURM_CONF", "SLURM_CLUSTERS"))
    ]
