"""One trial in one process on one run folder: `python -m gla_ablate.trial RUN_FOLDER`.

Reads `config.yaml` in the folder and trains it from the start; whatever an earlier, unfinished attempt left is removed.
A finished trial is left alone. Exit code 0: finished, 1: failed, 130: interrupted by SIGINT or SIGTERM; `status.json`
holds the reason, the caller keeps what is printed. A trial is done when `result.json` is there and the status says so.

With `GLA_ABLATE_PARENT` set to the parent's process id, the trial ends when its parent does.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from gla_ablate.status import Status, write_json

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. Not an `Exception`, so that nothing on the way takes it for an error of the trial."""


def main(arguments: list[str] | None = None) -> int:
    """Run the trial in the folder that the one argument names, as the only process on it."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        print("usage: python -m gla_ablate.trial RUN_FOLDER", file=sys.stderr)
        return 2
    folder = Path(given[0])
    if not (folder / "config.yaml").is_file():
        print(f"{folder}: no config.yaml here, so there is no trial to run", file=sys.stderr)
        return 2
    die_with_parent()
    try:
        with FileLock(folder / "trial.lock", timeout=0):
            return run_trial(folder)
    except Timeout:
        print(f"{folder}: another process is running this trial", file=sys.stderr)
        return 1


def run_trial(folder: Path) -> int:
    """Run the trial in `folder`, which this process owns, and return the exit code."""
    if is_finished(folder):
        print(f"{folder}: finished already")
        return 0
    raise_on_signals()
    remove_attempt(folder)
    status = Status(folder / "status.json")
    try:
        # Late, so that the seconds of importing Lightning pass with a status to see and signals handled.
        import torch

        from gla_ablate.config import read_config
        from gla_ablate.fit import fit

        if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
            torch.set_num_threads(int(threads))
        result = fit(read_config(folder / "config.yaml"), folder, status)
        write_json(folder / "result.json", result)
        status.write("finished")
    except Interrupted as signalled:
        status.write("interrupted", f"by {signalled} at step {status.step}")
        return 130
    except Exception as error:  # a gate or a data source can raise anything: the grid goes on without this trial
        traceback.print_exc()
        status.write("failed", failure(error))
        return 1
    return 0


def failure(error: Exception) -> str:
    """The reason of a failed trial in one short line."""
    import torch

    from gla_ablate.errors import ConfigError
    from gla_ablate.tracking import NonFinite

    text = " ".join(str(error).split())
    # torch has a class for the GPU's memory alone; its CPU allocator raises a bare RuntimeError.
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return "out of memory"
    if not isinstance(error, (NonFinite, ConfigError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def is_finished(folder: Path) -> bool:
    """Whether the trial in `folder` has its result."""
    status = folder / "status.json"
    if not (status.is_file() and (folder / "result.json").is_file()):
        return False
    return json.loads(status.read_text(encoding="utf-8"))["status"] == "finished"


def remove_attempt(folder: Path) -> None:
    """Remove what an unfinished attempt recorded: its curves would mix with the new ones."""
    for name in ("metrics.csv", "stamp.json", "result.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tensorboard", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)


def raise_on_signals() -> None:
    """Turn the first SIGINT or SIGTERM into `Interrupted`; later ones don't disturb the clearing up."""
    raised = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Interrupted(signal.Signals(number).name)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent named in `GLA_ABLATE_PARENT` ends, however it ends."""
    parent = os.environ.get("GLA_ABLATE_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the request
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())
