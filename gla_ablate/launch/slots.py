"""How one machine is divided among trials that run at the same time."""

from __future__ import annotations

import os
import re

from gla_ablate.errors import ConfigError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The visible GPUs as `CUDA_VISIBLE_DEVICES` names them, without a CUDA context in this process."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(i) for i in range(count)]


def threads() -> int | None:
    """The user's own number of threads for each trial; of a list, as OpenMP takes one, the first counts. Raises
    `ConfigError` for anything else, which each trial would fail of, or read in a way of its own."""
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not given:
        return None
    first, *inner = (number.strip() for number in given.split(","))
    if not all(re.fullmatch("0*[1-9][0-9]{0,5}", number) for number in (first, *inner)):
        raise ConfigError(f"OMP_NUM_THREADS: got {given!r}, takes a whole number from 1")
    return int(first)


def divide(jobs: int | None, per_gpu: int | None = None, devices: int = 1) -> list[dict[str, str]]:
    """The environment of each of `jobs` slots: `devices` GPUs where there are any, in turn, and an equal share of the
    cores.

    By default `per_gpu` (1) slots a GPU, or without GPUs two in all (one on fewer cores than that takes). An
    `OMP_NUM_THREADS` of the user's stands. Raises `ConfigError` for `devices` or a `per_gpu` that the GPUs here don't
    allow: none, or fewer slots than jobs, and for an `OMP_NUM_THREADS` that is no number.
    """
    names = gpus()
    check_part(per_gpu, devices)
    if per_gpu and not names:
        raise ConfigError("--per-gpu: there is no GPU here")
    if per_gpu and jobs and jobs > per_gpu * len(names):
        raise ConfigError(f"--jobs: got {jobs}, more than --per-gpu {per_gpu} on {len(names)} GPUs")
    if names and devices > len(names):
        raise ConfigError(f"trainer.devices: got {devices}, takes at most {len(names)}, the GPUs here")
    places = [",".join(names[i : i + devices]) for i in range(0, len(names) - devices + 1, devices)]
    count = jobs or len(places) * (per_gpu or 1) or min(2, max(1, cores() // devices))
    each = threads() or max(1, cores() // count)
    slots = [{"OMP_NUM_THREADS": str(each)} for _ in range(count)]
    for i, slot in enumerate(slots):
        if places:
            slot["CUDA_VISIBLE_DEVICES"] = places[i % len(places)]
    return slots


def check_part(per_gpu: int | None, devices: int) -> None:
    """That no trial on several GPUs is to get parts of them. Raises `ConfigError`."""
    if per_gpu and devices > 1:
        raise ConfigError(f"--per-gpu: goes with trials on one GPU, and of these one has trainer.devices {devices}")


def device_of(slot: dict[str, str]) -> str:
    """The name that a trial in this slot gives its device in `result.json`."""
    import torch

    from gla_ablate.stamp import cpu_name, device_name

    if "CUDA_VISIBLE_DEVICES" in slot:
        return device_name(torch.device("cuda"))
    return cpu_name(int(slot["OMP_NUM_THREADS"]))
