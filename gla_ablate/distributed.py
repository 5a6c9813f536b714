"""The processes that train one trial on several devices: they start, agree and end together.

Process number `rank` of `world` has device `local rank` of its machine. Rank 0 is the trial's own process: it alone
holds the lock and writes to the folder. torchrun or srun have started the others, or rank 0 starts them here. What one
of them fails of is told in the store through which they found each other, so that rank 0 can say it; what was
killed, its parent sees. Each of them ends when rank 0 does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gla_ablate.config import TrainerConfig
from gla_ablate.errors import ConfigError
from gla_ablate.launch.slots import cores, threads
from gla_ablate.ranks import OWN, Rank
from gla_ablate.status import Status

FAILURE = "failure"  # the key of the store: [status, reason] of the process that failed first
LOOK = 0.5  # seconds between looks for it
GRACE = 10.0  # seconds after which what still runs, or hangs since another is gone, is ended
SIGNALLED = 3.0  # seconds in which the end of a killed process shows, after its connections broke
TIMEOUT = timedelta(minutes=30)  # of anything that all wait for: rank 0 may be reading data for the first time


class Elsewhere(Exception):
    """Another process of the trial has failed, as `status` and `reason` say."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class Group:
    """The processes of a trial, as one of them sees them; by default one alone."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, node: int = 0) -> None:
        self.rank, self.world, self.local, self.node = rank, world, local, node
        # Of what is on the host: it waits for no GPU.
        self._host = dist.new_group(backend="gloo") if world > 1 else None

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host)
        return box[0]

    def all(self, value: Any) -> list[Any]:
        """Everybody's `value`, by rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value, group=self._host)
        return box

    def largest(self, *values: float) -> list[float]:
        """Of each of the numbers the largest that anybody has. Waits for the others, though not for their devices."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._host)
        return numbers.tolist()


def processes() -> int:
    """That train with this one, itself included."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, on its device and without waiting for it."""
    if processes() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def largest(x: Tensor) -> Tensor:
    """The same of the largest of each element."""
    if processes() > 1:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def share_of_mean(loss: Tensor, targets: int) -> Tensor:
    """`loss`, the mean over this process's `targets`, scaled so that the mean over processes, which is what gradients
    get, is the mean over all targets: where some are ignored, each process has another number of them."""
    if processes() == 1:
        return loss
    everybodys = total(torch.full((), float(targets), device=loss.device))
    return loss * (targets * processes() / everybodys)


@contextmanager
def company(trainer: TrainerConfig, folder: Path, rank: Rank | None, status: Status) -> Iterator[Group]:
    """The group of the trial in `folder`, connected as long as the body runs. `rank` is this process's, if others have
    been started already; else they are, and end with the body.

    Raises `ConfigError` for devices that aren't here, and `Elsewhere` where the body raises since another process has
    failed. If it rather hangs then, that is written to `status` and this process exits.
    """
    check_devices(trainer, rank)
    if trainer.processes == 1:
        yield Group()
        return
    others: list[subprocess.Popen[bytes]] = []
    left, patience = threading.Event(), GRACE
    server = connect(rank)
    # torchrun's store outlives an attempt, which another may follow.
    attempt = f"trial/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store = dist.PrefixStore(attempt, server)
    try:
        if rank is None:
            rank = Rank(0, trainer.processes, 0, 0, "127.0.0.1", server.port, "rank 0", True)
            others = start_others(rank, folder)
        if rank.number == 0:
            watch(dist.PrefixStore(attempt, server.clone()), others, status, left)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(rank.local)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=dist.PrefixStore("group", store), rank=rank.number,
            world_size=rank.world, timeout=TIMEOUT, device_id=torch.device("cuda", rank.local) if on_gpu else None,
        )  # fmt: skip
        group = Group(rank.number, rank.world, rank.local, rank.node)
        try:
            yield group
        except Exception as error:  # of any kind: the other processes must hear of it, and it goes on from here
            patience = 0.0
            from gla_ablate.trial import failure

            first = blame(store, failure(error, status.step), others)
            if first is not None:
                raise Elsewhere(*first) from error
            raise
        group.all(None)  # nobody leaves while another still needs it
    finally:
        for other in others:
            with suppress(subprocess.TimeoutExpired):
                other.wait(patience)
            other.kill()
            other.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        left.set()


def check_devices(trainer: TrainerConfig, rank: Rank | None) -> None:
    """That there are as many processes and GPUs as the trial asks for. Raises `ConfigError`."""
    if rank is not None and rank.world != trainer.processes:
        raise ConfigError(
            f"trainer.devices: got {trainer.devices} (trainer.num_nodes {trainer.num_nodes}), but {rank.starter} "
            f"started {rank.world} processes; takes as many as devices · num_nodes"
        )
    if rank is None and trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: got {trainer.num_nodes}, takes a start by torchrun or srun on each node "
            "(docs/scaling.md), or 1"
        )
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and trainer.devices > gpus:
        raise ConfigError(f"trainer.devices: got {trainer.devices}, takes at most {gpus}, the GPUs that this trial has")


def connect(rank: Rank | None) -> Any:
    """The store where the processes find each other: of rank 0 alone on a port that is free, or of all where `rank`
    says."""
    if rank is None:
        return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, timeout=TIMEOUT)
    serves = rank.number == 0 and not rank.served
    return dist.TCPStore(rank.address, rank.port, None, serves, wait_for_workers=False, timeout=TIMEOUT)


def start_others(first: Rank, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Ranks 1 … of the trial in `folder`, beside this one, with an equal share of its threads each."""
    each = max(1, (threads() or cores()) // first.world)
    torch.set_num_threads(each)
    given = {**os.environ, "OMP_NUM_THREADS": str(each), "GLA_ABLATE_PARENT": str(os.getpid())}
    command = [sys.executable, "-m", "gla_ablate.trial", str(folder)]
    return [
        subprocess.Popen(command, env=given | {OWN: str(replace(first, number=i))}, stdin=subprocess.DEVNULL)
        for i in range(1, first.world)
    ]


def watch(store: Any, others: list[subprocess.Popen[bytes]], status: Status, left: threading.Event) -> None:
    """In a thread: ends this process, which may be waiting for it in a library that never gives up, some time after
    another process has failed. Not if it has `left` the group by then."""

    def look() -> None:
        found = None
        while not found and not left.wait(LOOK):
            gone = killed(others) or gave_up(others)  # before the store is read: who can, tells before it ends
            found = told(store) or gone
        if found and not left.wait(GRACE):
            status.write(*found)
            for other in others:
                other.kill()
            os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def blame(store: Any, own: tuple[str, str], others: list[subprocess.Popen[bytes]]) -> tuple[str, str] | None:
    """What the failure of the group began with, if not with this process's `own`, which is told to the others."""
    with suppress(Exception):  # with rank 0, the store is gone as well
        text = json.dumps(own)
        if store.compare_set(FAILURE, "", text).decode() != text:
            return told(store)
        deadline = time.monotonic() + SIGNALLED
        while others and time.monotonic() < deadline:
            if found := killed(others):
                return found
            time.sleep(0.05)
    return None


def told(store: Any) -> tuple[str, str] | None:
    """What a process has told that it failed of."""
    if not store.check([FAILURE]):
        return None
    status, reason = json.loads(store.get(FAILURE))
    return status, reason


def killed(others: list[subprocess.Popen[bytes]]) -> tuple[str, str] | None:
    """The status and the reason of one that ended by a signal."""
    for number, other in enumerate(others, start=1):
        code = other.poll()
        if code is not None and code < 0:
            return "killed", f"process {number} of {len(others) + 1} by signal {-code} ({signal.Signals(-code).name})"
    return None


def gave_up(others: list[subprocess.Popen[bytes]]) -> tuple[str, str] | None:
    """The same of one that ended by itself, which it may have told why or may not have come to."""
    for number, other in enumerate(others, start=1):
        if other.poll() not in (None, 0, 130):
            return "failed", f"process {number} of {len(others) + 1} with exit code {other.returncode}"
    return None
