"""One trial in one process on one run folder: `python -m gla_ablate.trial RUN_FOLDER`.

Reads `config.yaml` in the folder and trains it, from the last checkpoint of an earlier, unfinished attempt if there is
one (`resume`). A finished trial is left alone. Exit code 0: finished, 1: failed, 28: failed since the disk is full,
130: interrupted by SIGINT or SIGTERM, with a checkpoint saved if training had begun; `status.json` says how
(`status.FAILED`) and why, the caller keeps what is printed. A trial is done when `result.json` is there and the status
says so.

With `GLA_ABLATE_PARENT` set to the parent's process id, the trial ends when its parent does.

A trial on several devices starts a process more for each (`distributed`), or torchrun or srun has started one of these
for each (`ranks`); all but rank 0 write nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gla_ablate.interruption import Interrupted, Interruption
from gla_ablate.ranks import Rank, own_rank
from gla_ablate.status import Status, Unwritten, read_json, write_json

DISK_FULL = errno.ENOSPC  # the exit code where not even the status could be written
OTHERS = 2.0  # seconds for those who hold the lock for a moment, to see whether it is free
GIB = 2**30
LESS_MEMORY = "takes less with smaller data.batch_size or data.seq_len, larger trainer.accumulate, or trainer.recompute"
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


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
    rank = own_rank(lambda: wanted(folder))
    if rank is not None and rank.number > 0:
        die_with_parent(signal.SIGKILL)  # its work is rank 0's to save
        return run_trial(folder, rank)
    die_with_parent()
    try:
        with FileLock(folder / "trial.lock", timeout=OTHERS):
            return run_trial(folder, rank)
    except Timeout:
        print(f"{folder}: another process is running this trial", file=sys.stderr)
        return 1
    except OSError as error:  # of the status itself, which so can't say it
        if not disk_is_full(error):
            raise
        with suppress(OSError):
            traceback.print_exc()
        return DISK_FULL


def run_trial(folder: Path, rank: Rank | None = None) -> int:
    """Run the trial in `folder`, which this process owns, and return the exit code. Or one of its processes, `rank`."""
    if is_finished(folder):
        print(f"{folder}: finished already")
        return 0
    interruption = Interruption()
    interruption.install()
    first = rank is None or rank.number == 0
    status = (Status if first else Unwritten)(folder / "status.json")
    try:
        # Late, so that the seconds of importing Lightning pass with a status to see and signals handled.
        import torch

        from gla_ablate.config import read_config
        from gla_ablate.distributed import company
        from gla_ablate.fit import fit
        from gla_ablate.launch.slots import threads

        if given := threads():
            torch.set_num_threads(given)
        config = read_config(folder / "config.yaml")
        with company(config.trainer, folder, rank, status) as group:
            result = fit(config, folder, status, interruption, group)
        if first:
            write_json(folder / "result.json", result)
        status.write("finished")
    except (Interrupted, SystemExit):  # Lightning makes an exit of a SIGTERM that comes before training or validating
        if interruption.asked is None:
            raise
        status.write("interrupted", f"by {interruption.asked} at step {status.step}")
        return 130
    except Exception as error:  # a gate or a data source can raise anything: the grid goes on without this trial
        with suppress(OSError):  # where it goes is on the same disk
            traceback.print_exc()
        status.write(*failure(error, status.step))
        return 1
    return 0


def failure(error: Exception, step: int) -> tuple[str, str]:
    """The status of a failed trial, and the reason in one short line."""
    import torch

    from gla_ablate.distributed import Elsewhere
    from gla_ablate.errors import ConfigError
    from gla_ablate.resume import TimeIsUp
    from gla_ablate.tracking import NonFinite

    text = " ".join(str(error).split())
    if isinstance(error, Elsewhere):
        return error.status, error.reason
    if isinstance(error, NonFinite):
        return "diverged", text
    if isinstance(error, TimeIsUp):
        return "out of time", text
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory", f"on the GPU after step {step}{held_by_torch()}; {LESS_MEMORY}"
    # torch has a class for the GPU's memory alone; its CPU allocator raises a bare RuntimeError.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory", f"on the host after step {step}{held_by_process()}; {LESS_MEMORY}"
    if disk_is_full(error):
        return "disk full", f"no space left after step {step}"
    if not isinstance(error, ConfigError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return "failed", text if len(text) <= 200 else f"{text[:199]}…"


def held_by_torch() -> str:
    """Of the GPU, with what its allocator kept for later; "" where there is none."""
    import torch

    if not torch.cuda.is_available():
        return ""
    most, all_of_it = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties().total_memory
    return f": PyTorch held up to {most / GIB:.1f} of {all_of_it / GIB:.1f} GiB"


def held_by_process() -> str:
    """Of the machine."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    all_of_it = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f": the process held up to {most / GIB:.1f} of {all_of_it / GIB:.1f} GiB"


def disk_is_full(error: BaseException | None) -> bool:
    """Also where a library has made another error of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_finished(folder: Path) -> bool:
    """Whether the trial in `folder` has its result."""
    status, result = read_json(folder / "status.json"), read_json(folder / "result.json")
    return (status or {}).get("status") == "finished" and isinstance((result or {}).get("metrics"), dict)


def wanted(folder: Path) -> int:
    """How many processes the trial is to have; 1 if that can't be read, which the trial will say."""
    from gla_ablate.config import read_config
    from gla_ablate.errors import ConfigError

    try:
        return read_config(folder / "config.yaml").trainer.processes
    except ConfigError:
        return 1


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask Linux for this signal when the parent named in `GLA_ABLATE_PARENT` ends, however it ends."""
    parent = os.environ.get("GLA_ABLATE_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != int(parent):  # it ended before the request
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())
