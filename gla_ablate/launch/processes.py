"""How a trial gets its process: a fresh interpreter, or a fork of one that has imported everything already.

The imports of a trial take seconds. On a CPU a server imports them once and forks for each trial; nothing is computed
in it, so that there are no threads to lose. On a GPU trials are interpreters of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, popen_forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol

from gla_ablate import stamp
from gla_ablate.stamp import Code, code_state

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("gla_ablate.launch.preload",)
COMMAND = (sys.executable, "-m", "gla_ablate.trial")


class Process(Protocol):
    """As `subprocess.Popen` has it: a negative return code is a signal's number. It may be on another machine."""

    returncode: int | None
    begun: bool  # until then it waits for a place, and ending it takes it back without a trace
    ended_by: str | None  # what ended it from outside, where that isn't a signal: "its node was lost"
    again: bool  # whether that asks for another start, elsewhere

    def poll(self) -> int | None: ...


class Ended(Process):
    """Of a trial that could not be begun."""

    begun, again = False, False

    def __init__(self, code: int, by: str | None = None) -> None:
        self.returncode, self.ended_by = code, by

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        pass

    kill = terminate


class Start(Protocol):
    """Begins the trial in a folder, in a slot of the machine, with what it prints appended to a log. None: not now."""

    waits: bool  # whether the process waits by itself for another that still holds the trial's lock

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> Process | None: ...

    def terminate(self, processes: Sequence[Process]) -> None:
        """Tell these, which it has begun, to save and end."""

    def kill(self, processes: Sequence[Process]) -> None:
        """End these at once."""


class EachAlone:
    """Of a `Start` whose processes are told one by one."""

    def terminate(self, processes: Sequence[Any]) -> None:
        for process in processes:
            process.terminate()

    def kill(self, processes: Sequence[Any]) -> None:
        for process in processes:
            process.kill()


class Here:
    """Of a process on this machine, which begins at once and ends by a signal or by itself."""

    begun, again = True, False
    ended_by: str | None = None


class Spawned(Here, subprocess.Popen[bytes]):
    pass


class Spawn(EachAlone):
    """Starts `command` with the trial's folder as its last argument."""

    waits = False

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        self.command = command

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> Process:
        return Spawned(
            [*self.command, str(home)],
            env={**os.environ, **surroundings(), **slot, "GLA_ABLATE_PARENT": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Fork(EachAlone):
    """Forks a server that begins to import when this is made."""

    waits = False

    def __init__(self) -> None:
        os.environ.update(surroundings())
        forkserver.set_forkserver_preload(list(PRELOADED))
        if SERVED and [server()._forkserver_pid, dict(os.environ), code_state()] != SERVED:
            stop_server()  # an earlier call's, whose environment the trials would have, and whose code
        self.ensure_server()

    def __call__(self, home: Path, slot: dict[str, str], log: IO[bytes]) -> Process:
        self.ensure_server()
        process = ForkedProcess(target=run, args=(str(home), slot, log.name, SERVED[2]))
        wake()
        try:
            with no_main():
                process.start()
        except (EOFError, ConnectionError):  # the server was killed as it imported, say
            return Ended(-signal.SIGKILL)
        return Forked(process)

    def ensure_server(self) -> None:
        forkserver.ensure_running()
        if SERVED[:1] != [server()._forkserver_pid]:  # a new one, perhaps in place of one that was killed
            SERVED[:] = [server()._forkserver_pid, dict(os.environ), code_state()]


# Of this process's server: its process id, its environment, and the code that it imports, whatever is edited later.
SERVED: list[Any] = []


def server() -> Any:
    """multiprocessing's own, of which there is one a process."""
    return forkserver._forkserver


def stop_server() -> None:
    """End the server if there is one; no trial of its is left."""
    if server()._forkserver_pid is not None:
        os.kill(server()._forkserver_pid, signal.SIGKILL)  # it may be importing, or stopped
        server()._stop()


def wake() -> None:
    """Let the server go on if somebody has stopped it (SIGSTOP): else it would neither fork nor say how a trial ended,
    and what asks for that waits forever."""
    if server()._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(server()._forkserver_pid, signal.SIGCONT)


class ForkedPopen(popen_forkserver.Popen):
    """Whose process, if its server was killed, ends by SIGKILL as the server did; multiprocessing makes an exit code of
    it, 255, that a trial can have by itself."""

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None and connection.wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            try:
                self.returncode = forkserver.read_signed(self.sentinel)
            except (OSError, EOFError):
                self.returncode = -signal.SIGKILL
        return self.returncode


class ForkedProcess(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return ForkedPopen(process_obj)


@contextmanager
def no_main() -> Iterator[None]:
    """Else multiprocessing would import in every trial, once more, the script that called."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Forked(Here):
    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process
        self.returncode: int | None = None

    def poll(self) -> int | None:
        wake()
        self.returncode = self.process.exitcode
        return self.returncode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def surroundings() -> dict[str, str]:
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}


def run(home: str, slot: dict[str, str], log: str, code: Code) -> None:
    """A forked trial: in a session of its own, since Ctrl-C is for the launcher, with its log for output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the server ignores
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # which it holds back
    let_go_of_the_server()
    os.setsid()
    os.environ.update(slot, GLA_ABLATE_PARENT=str(os.getppid()))
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.orig_argv[:] = [*COMMAND, home]  # for the stamp: what would do the same
    stamp.loaded = code
    from gla_ablate.trial import main

    sys.exit(main([home]))


def let_go_of_the_server() -> None:
    """The server ends, and its trials with it, once nobody holds the other end of a pipe; multiprocessing gives that to
    every child, so that each could start more."""
    if server()._forkserver_alive_fd is not None:
        os.close(server()._forkserver_alive_fd)
        server()._forkserver_alive_fd = None


def starter(slots: list[dict[str, str]]) -> Start:
    """Of trials in these slots: by forks where no GPU is used, and a server can be had."""
    on_gpu = any("CUDA_VISIBLE_DEVICES" in slot for slot in slots)
    if on_gpu or not sys.platform.startswith("linux"):
        return Spawn()
    try:
        return Fork()
    except OSError:  # its socket's path, in TMPDIR, may be too long
        return Spawn()
