"""How a trial gets its process: a fresh interpreter, or a fork of one that has imported everything already.

The imports of a trial take seconds. On a CPU a server imports them once and forks for each trial; nothing is computed
in it, so that there are no threads to lose. On a GPU trials are interpreters of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import IO, Protocol

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("gla_ablate.trial", "gla_ablate.fit", "tensorboard.compat")
SERVER_GONE = 255  # what multiprocessing says of a process whose server was killed
COMMAND = (sys.executable, "-m", "gla_ablate.trial")


class Process(Protocol):
    """As `subprocess.Popen` has it: a negative return code is a signal's number."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Start(Protocol):
    """Begins the trial in a folder, in a slot of the machine, with what it prints appended to a log."""

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> Process: ...


class Spawn:
    """Starts `command` with the trial's folder as its last argument."""

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        self.command = command

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> Process:
        return subprocess.Popen(
            [*self.command, str(home)],
            env={**os.environ, **surroundings(), **slot, "GLA_ABLATE_PARENT": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Fork:
    """Forks a server that begins to import when this is made."""

    def __init__(self) -> None:
        os.environ.update(surroundings())  # which the server has for good from its start on
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))
        from multiprocessing.forkserver import ensure_running

        ensure_running()

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> Process:
        process = self.context.Process(target=run, args=(str(home), slot, log.name))
        with no_main():
            process.start()
        return Forked(process)


@contextmanager
def no_main() -> Iterator[None]:
    """Else multiprocessing would import in every trial, once more, the script that called."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Forked:
    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process
        self.returncode: int | None = None

    def poll(self) -> int | None:
        code = self.process.exitcode
        self.returncode = -signal.SIGKILL if code == SERVER_GONE else code
        return self.returncode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def surroundings() -> dict[str, str]:
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}


def run(home: str, slot: dict[str, str], log: str) -> None:
    """A forked trial: in a session of its own, since Ctrl-C is for the launcher, with its log for output."""
    os.setsid()
    os.environ.update(slot, GLA_ABLATE_PARENT=str(os.getppid()))
    written = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(written, number)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # real files, as an interpreter makes them
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from gla_ablate.trial import main

    sys.exit(main([home]))


def starter(slots: list[dict[str, str]]) -> Start:
    """Of trials in these slots: by forks where no GPU is used."""
    on_gpu = any("CUDA_VISIBLE_DEVICES" in slot for slot in slots)
    return Spawn() if on_gpu or not sys.platform.startswith("linux") else Fork()
