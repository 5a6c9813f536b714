"""Which of a trial's processes this one is, as who started it has written into its environment. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

OWN = "GLA_ABLATE_RANK"  # of a process that rank 0 of the same machine has started: rank/world@address:port


@dataclass(frozen=True)
class Rank:
    """Number `number` of the `world` processes of a trial, and number `local` on machine number `node`."""

    number: int
    world: int
    local: int
    node: int
    address: str  # where they find each other
    port: int
    starter: str  # torchrun | srun | rank 0
    served: bool  # whether somebody serves there already; else rank 0 does

    def __str__(self) -> str:
        return f"{self.number}/{self.world}@{self.address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`, of a process beside rank 0."""
        numbers, _, place = text.partition("@")
        number, world = map(int, numbers.split("/"))
        address, _, port = place.rpartition(":")
        return cls(number, world, number, 0, address, int(port), "rank 0", True)


def own_rank(processes: Callable[[], int], environment: Mapping[str, str] = os.environ) -> Rank | None:
    """Of this process; None if it is to run the trial by itself, and start what others that takes.

    `processes()`, how many the trial wants, is only asked inside a step of several tasks of SLURM, which may be there
    for something else.
    """
    if OWN in environment:
        return Rank.parse(environment[OWN])
    if "TORCHELASTIC_RUN_ID" in environment and int(environment["WORLD_SIZE"]) > 1:
        number, world, local, node = (
            int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
        )
        served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return Rank(number, world, local, node, address, port, "torchrun", served)
    # Of the step, not SLURM_NTASKS, which a whole job has: run.py, or a trial by itself, may run in one of many tasks.
    world = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world > 1 and processes() > 1:
        number, local, node = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
        address = environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"])
        port = int(environment.get("MASTER_PORT") or 15000 + int(environment["SLURM_JOB_ID"]) % 10_000)
        return Rank(number, world, local, node, address, port, "srun", False)
    return None


def first_node(nodes: str) -> str:
    """Of SLURM's list of nodes: "gpu[07-12,15],login1" → "gpu07"."""
    name, bracket, rest = nodes.split(",")[0].partition("[")
    return name + (rest.split("-")[0].rstrip("]") if bracket else "")
