"""Where a grid runs: `--launcher local`, `ray` or `slurm`, with what is checked of each before anything starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial
from gla_ablate.launch.on_ray import StartOnRay, address, cluster, share
from gla_ablate.launch.processes import Start, starter
from gla_ablate.launch.slots import check_part, divide, threads
from gla_ablate.launch.slurm_options import CLUSTER, complete

JOBS = 32  # of SLURM at a time, where nobody has said


@dataclass(frozen=True)
class Place:
    """`slots`: the environment of each trial that may be under way. `count` of them run at the same time, as far as is
    known."""

    start: Start
    slots: list[dict[str, str]]
    count: int
    where: str = ""  # in a summary


class Launcher(Protocol):
    def open(self, todo: list[Trial], folder: Path) -> AbstractContextManager[Place]:
        """Raises `ConfigError` for what only shows there: a cluster that can't be reached, say."""


class Local:
    def __init__(self, jobs: int | None, per_gpu: int | None, devices: int = 1) -> None:
        self.slots = divide(jobs, per_gpu, devices)

    @contextmanager
    def open(self, todo: list[Trial], folder: Path) -> Iterator[Place]:
        check_backend(todo, self.slots)
        yield Place(starter(self.slots), self.slots, len(self.slots))


class Ray:
    def __init__(self, jobs: int | None, per_gpu: int | None, devices: int = 1) -> None:
        check_installed("ray")
        check_part(per_gpu, devices)
        self.jobs, self.per_gpu, self.devices = jobs, per_gpu, devices
        self.threads, self.address = threads(), address()

    @contextmanager
    def open(self, todo: list[Trial], folder: Path) -> Iterator[Place]:
        with cluster(self.address) as nodes:
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
            part = share(nodes, self.jobs, self.per_gpu, self.threads, gpu, self.devices)
            slots = [{"OMP_NUM_THREADS": str(part.cpus)}] * (self.jobs or len(todo))
            where = f" on a Ray cluster of {len(nodes)} node{'s' * (len(nodes) > 1)}"
            yield Place(StartOnRay(part), slots, min(part.places, len(todo)), where)


class Slurm:
    def __init__(self, jobs: int | None, given: Sequence[tuple[str, Any]], devices: int = 1) -> None:
        check_installed("submitit", extra="slurm")
        self.jobs, self.devices, self.options = jobs, devices, complete(given, threads(), devices)
        for command in ("sbatch", "srun", "squeue"):
            if self.options[CLUSTER] == "slurm" and shutil.which(command) is None:
                raise ConfigError(
                    f"--launcher slurm: there is no {command} here, so this is no machine of a SLURM cluster "
                    "(--slurm cluster=local tries the jobs on this one)"
                )

    @contextmanager
    def open(self, todo: list[Trial], folder: Path) -> Iterator[Place]:
        from gla_ablate.launch.on_slurm import StartOnSlurm
        from gla_ablate.launch.slurm_queue import ranges

        if self.options[CLUSTER] == "local":
            slots = divide(self.jobs, devices=self.devices)
            count = len(slots)
        else:
            slots = [{"OMP_NUM_THREADS": str(threads() or self.options["cpus_per_task"])}] * len(todo)
            count = min(self.jobs or JOBS, len(todo))
        start = StartOnSlurm(folder, self.options, count)
        new = start.take_up([folder / trial.id for trial in todo])
        found = len(todo) - len(new)
        try:
            if self.options[CLUSTER] == "slurm":
                start.submit_all(new, slots[0])
            todo.sort(key=lambda trial: folder / trial.id not in start.submitted)  # the others wait for their turn
            yield Place(start, slots, count, " as jobs" + f", {found} of them submitted before" * (found > 0))
        finally:
            start.cancel()  # those that nobody has begun to watch
            if start.lingering:
                jobs = " ".join(ranges(start.lingering))
                print(f"scancel failed, so these jobs may go on; the same command finds them: {jobs}", file=sys.stderr)


def launcher(
    name: str, jobs: int | None, per_gpu: int | None, slurm: Sequence[tuple[str, Any]], grid: Sequence[Trial] = ()
) -> Launcher:
    """The one of that name, with a place for each trial of `grid`. Raises `ConfigError` for what it lacks here."""
    devices = widest(grid)
    if name == "slurm":
        return Slurm(jobs, slurm, devices)
    return (Ray if name == "ray" else Local)(jobs, per_gpu, devices)


def widest(grid: Sequence[Trial]) -> int:
    """The most devices that a trial has. Raises `ConfigError` for one on several nodes."""
    nodes = max((trial.config.trainer.num_nodes for trial in grid), default=1)
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: got {nodes}, but run.py starts a trial on one node; --prepare makes its folder, and "
            "torchrun or srun on each node starts it (docs/scaling.md)"
        )
    return max((trial.config.trainer.devices for trial in grid), default=1)


def check_backend(todo: Sequence[Trial], slots: Sequence[dict[str, str]]) -> None:
    """That no trial asks for a GPU's kernels where there is none: each of them would fail in its turn. Raises
    `ConfigError`."""
    wanting = [trial.id for trial in todo if trial.config.model.backend == "triton"]
    if not wanting or any("CUDA_VISIBLE_DEVICES" in slot for slot in slots):
        return
    from gla_ablate.ops.op import resolve_backend  # Triton, which else no launcher needs

    try:
        resolve_backend("triton", "cpu")
    except ValueError as error:
        raise ConfigError(
            f"model.backend: got 'triton' in {len(wanting)} of {len(todo)} trials to run ({wanting[0]}), takes it "
            "where there is a GPU, and here is none; 'auto' takes 'torch' then"
        ) from error


def check_installed(package: str, extra: str | None = None) -> None:
    if importlib.util.find_spec(package) is None:
        extra = extra or package
        raise ConfigError(f"--launcher {extra}: needs {package}, which isn't installed: pip install -e '.[{extra}]'")
