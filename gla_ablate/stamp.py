"""`stamp.json` of a trial: the code, the software and the machine that a result came from."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("gla_ablate", "triton", "lightning", "datasets", "numpy")


def stamp(device: torch.device, backend: str, precision: str, data: dict[str, Any]) -> dict[str, Any]:
    """The stamp of this process. `backend` is the op's, `data` the source's own stamp."""
    return {
        "git": git_state(Path(__file__).resolve().parent),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}  # with its CUDA
        | {name: installed(name) for name in PACKAGES},
        "device": device_name(device),
        "backend": backend,
        "precision": precision,
        "data": data,
        "command": shlex.join(sys.orig_argv),
    }


def installed(package: str) -> str | None:
    """The version of a distribution; None if it isn't installed (triton on a machine without CUDA)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or "cpu (x86_64, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name(torch.get_num_threads())


def cpu_name(threads: int) -> str:
    return f"cpu ({platform.machine()}, {threads} threads)"


def git_state(folder: Path) -> dict[str, Any]:
    """{sha, dirty} of the checkout that holds `folder`; both None outside of one or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"sha": None, "dirty": None}
