"""Trials on the nodes of a Ray cluster, which share the folder of the runs, this package and the working directory.

A trial is a process there as it is here: of an actor (`ray_host`) that asks Ray for the trial's CPUs and GPU. Where a
node, or a worker of Ray's, is lost, the trial starts again on another and goes on from its last checkpoint, not before
its lock is free; it ends with the worker, and the worker with the node and with this process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from gla_ablate.errors import ConfigError
from gla_ablate.launch import ray_host
from gla_ablate.launch.processes import EachAlone, surroundings
from gla_ablate.launch.slots import cores

WAITING = 16  # trials that wait for a place at a time: they make a cluster that can grow do so
GRAINS = 10_000  # Ray counts a resource in
OBJECTS = 80 * 2**20  # bytes of Ray's object store, which holds nothing of a trial's; it takes no less than 75 MiB

OF_THE_NODE = ("CUDA_VISIBLE_DEVICES", "RAY_")  # beginnings of variables of this process that no trial takes over


class Share(NamedTuple):
    """What a trial gets of a cluster."""

    cpus: int
    gpus: float
    places: int  # trials that the cluster holds at the same time, as it is


def share(
    nodes: Sequence[Mapping[str, float]], jobs: int | None, per_gpu: int | None, threads: int | None, gpu: bool,
    devices: int = 1,
) -> Share:  # fmt: skip
    """How the `nodes`, each by its resources, are divided among `jobs` trials at a time, or as many as they hold.

    With `gpu`, where there are any, each trial gets `devices` or a part of one, and an equal share of its node's CPUs;
    else so many CPUs that all jobs have a place, or one for each of `devices`. `threads` of the user's stand. Raises
    `ConfigError` where no node could take a trial; of what an autoscaler would add nothing is known.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) * gpu for node in nodes]
    if per_gpu and not any(gpus):
        raise ConfigError("--per-gpu: there is no GPU in the Ray cluster (nodes that are yet to come don't count)")
    if any(gpus):
        slots = [n // devices * (per_gpu or 1) for n in gpus]
        if not any(slots):
            raise ConfigError(
                f"trainer.devices: got {devices}, takes at most {max(gpus)}, the GPUs of a node of the Ray cluster"
            )
        each = threads or max(1, min(c // s for c, s in zip(cpus, slots, strict=True) if s))
        count = sum(min(c // each, s) for c, s in zip(cpus, slots, strict=True))
    else:
        fitting = (n for n in range(max(cpus, default=0), 0, -1) if sum(c // n for c in cpus) >= (jobs or 0))
        each = threads or (next(fitting, devices) if jobs else devices)
        count = sum(c // each for c in cpus)
    if not count:
        raise ConfigError(
            f"--launcher ray: a trial takes {each} CPUs (OMP_NUM_THREADS), and no node has as many (nodes that are yet "
            "to come don't count)"
        )
    part = devices * (GRAINS // (per_gpu or 1)) / GRAINS  # where Ray rounds up, the last one would have no place
    return Share(each, part if any(gpus) else 0.0, min(count, jobs or count))


def address() -> str | None:
    """Of the cluster that RAY_ADDRESS names or that `ray start` began on this machine; None without one. Raises
    `ConfigError` where RAY_ADDRESS names none that can be reached, which Ray itself would take minutes to tell."""
    given = os.environ.get("RAY_ADDRESS", "auto")
    if given in ("", "auto"):
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        try:
            noted = Path(folder, "ray", "ray_current_cluster").read_text().strip()
        except OSError:
            return None
        return noted if answers(noted) else None
    if given == "local":
        return None
    if given.startswith("ray://"):
        raise ConfigError("RAY_ADDRESS: got ray://…, takes host:port, from a machine that shares the cluster's files")
    if not answers(given):
        raise ConfigError(f"RAY_ADDRESS: nothing answers at {given!r}; takes host:port of a Ray cluster, auto or local")
    return given


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            return True
    except (OSError, ValueError, OverflowError):
        return False


@contextmanager
def cluster(address: str | None) -> Iterator[list[dict[str, float]]]:
    """Connects to the cluster at `address`, without one to one of its own that ends with this process; the resources of
    its nodes. Raises `ConfigError` where Ray can't."""
    import ray

    # Ray's lines would break the live table; those of a lost node, which come all the same, a whole screen of them.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    own: dict[str, Any] = {"num_cpus": cores(), "object_store_memory": OBJECTS, "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address or "local", **quiet, **({} if address else own))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--launcher ray: {address or 'no cluster of its own'}: {first_line(error)}") from error
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


class StartOnRay(EachAlone):
    """Starts trials that take `share` of the cluster each."""

    waits = False

    def __init__(self, share: Share) -> None:
        import ray

        ray.cloudpickle.register_pickle_by_value(ray_host)
        options: dict[str, Any] = {
            "num_cpus": share.cpus,
            "num_gpus": share.gpus,
            "max_restarts": 0,
            "max_concurrency": 3,
        }
        self.actor = ray.remote(**options)(ray_host.Host)
        given = {**os.environ, **surroundings()}
        self.given = {name: x for name, x in given.items() if not name.startswith(OF_THE_NODE)}
        if not share.gpus:
            self.given["CUDA_VISIBLE_DEVICES"] = ""  # else it would see those of its node
        self.started: list[OnRay] = []

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> OnRay | None:
        self.started = [process for process in self.started if process.is_waiting()]
        if len(self.started) >= WAITING:
            return None
        process = OnRay(self.actor.remote(), str(home.absolute()), self.given | slot)
        self.started.append(process)
        return process


class OnRay:
    """A trial's process on some node."""

    def __init__(self, actor: Any, home: str, given: dict[str, str]) -> None:
        self.actor = actor
        self.returncode: int | None = None
        self.begun = False
        self.ended_by: str | None = None
        self.again = False
        self._end = actor.run.remote(home, os.getcwd(), given)
        self._begin = actor.wait_until_begun.remote()

    def is_waiting(self) -> bool:
        return not self.begun and self.returncode is None

    def poll(self) -> int | None:
        import ray

        if self.returncode is None and is_ready(self._end):
            try:
                self.returncode, self.begun = ray.get(self._end), True
            except ray.exceptions.RayError as error:
                self._lost(error)
            ray.kill(self.actor)  # so that its resources are free at once
        elif not self.begun:
            self.begun = is_ready(self._begin)
        return self.returncode

    def _lost(self, error: Exception) -> None:
        """Of a node or a worker, which starts the trial elsewhere; not so what the worker itself raised."""
        import ray

        self.returncode = -signal.SIGKILL
        raised = isinstance(error, ray.exceptions.RayTaskError) or getattr(error, "actor_init_failed", False)
        self.again = not raised
        if raised:
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            self.ended_by = f"Ray could not start it: {last.strip()[:200]}"
        else:
            self.ended_by = "its node or its Ray worker was lost"

    def terminate(self) -> None:
        import ray

        if self.begun:
            self.actor.send.remote(signal.SIGTERM)
        else:
            ray.kill(self.actor)

    def kill(self) -> None:
        self.actor.send.remote(signal.SIGKILL)


def is_ready(reference: Any) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=0)[0])


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
