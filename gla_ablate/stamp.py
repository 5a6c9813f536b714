"""`stamp.json` of a trial: the code, the software and the machine that a result came from; and `code-….diff`, what the
checkout held beyond its commit."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch  # where a function needs it: what starts trials does without it, and its import takes seconds

DRIVER = Path("/proc/driver/nvidia/version")
PACKAGE = Path(__file__).resolve().parent
PACKAGES = ("gla_ablate", "triton", "lightning", "datasets", "numpy")


class Code(NamedTuple):
    """The code of this package as it is on disk: {sha, dirty} of the checkout, and what it holds beyond its commit, as
    a file's name, the same for the same changes, and its content (None, "" without any)."""

    state: dict[str, Any]
    name: str | None
    changes: str


loaded: Code | None = None  # as it was when a server imported it, of which this process is a fork


def code_state() -> Code:
    changes = uncommitted(PACKAGE)
    digest = hashlib.sha256(changes.encode("utf-8", errors="surrogateescape")).hexdigest()[:12]
    return Code(git_state(PACKAGE), f"code-{digest}.diff" if changes else None, changes)


def uncommitted(folder: Path) -> str:
    """What the checkout that holds `folder` has beyond its commit, files in `folder` that git doesn't know included, as
    a diff that any clone can apply, whatever the user's settings; "" outside of one."""
    plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/")
    index = git(folder, "rev-parse", "--git-path", "index")
    if index is None:
        return ""
    with tempfile.TemporaryDirectory() as place:  # a copy of the user's index, to which new files can be added
        try:
            shutil.copy2(folder / index.rstrip("\n"), f"{place}/index")
        except OSError:  # of a checkout without a file
            return ""
        copied = {"GIT_INDEX_FILE": f"{place}/index"}
        git(folder, "add", "--intent-to-add", "--", str(folder), **copied)
        return git(folder, "diff", "HEAD", "--binary", *plain, **copied) or ""


def stamp(
    folder: Path, device: torch.device, backend: str, precision: str, data: dict[str, Any], plugin: str | None
) -> dict[str, Any]:
    """The stamp of this process, which runs the trial in `folder`. `backend` is the op's, `data` the source's own
    stamp, `plugin` the sha256 of the file that the gate came from. Writes there what isn't committed."""
    import torch

    code = loaded or code_state()
    if code.name:
        (folder / code.name).write_text(code.changes, encoding="utf-8", errors="surrogateescape")
    return {
        "git": code.state | {"diff": code.name},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}  # with its CUDA
        | {name: installed(name) for name in PACKAGES},
        "device": device_name(device),
        "machine": {"host": platform.node(), "driver": driver(), "threads": torch.get_num_threads()},
        "backend": backend,
        "precision": precision,
        "data": data,
        "plugin": plugin,
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
    }


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    except OSError:
        return None
    return found and found.group()


def installed(package: str) -> str | None:
    """The version of a distribution, as the stamp has it; None if it isn't installed (triton on a machine without
    CUDA)."""
    if package == "torch" and (found := torch_version()) is not None:
        return found
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or "cpu (x86_64, 2 threads)"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name(torch.get_num_threads())


def has_bf16(kind: str) -> bool:
    """Whether a device of this kind, "cuda" or "cpu", is a GPU that computes in bf16 rather than emulate it."""
    import torch

    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_name(threads: int) -> str:
    return f"cpu ({platform.machine()}, {threads} threads)"


def git_state(folder: Path) -> dict[str, Any]:
    """{sha, dirty} of the checkout that holds `folder`; both None outside of one or without git. A file inside `folder`
    that git doesn't know counts, too."""
    sha = git(folder, "rev-parse", "HEAD")
    tracked = git(folder, "status", "--porcelain", "--untracked-files=no")
    own = git(folder, "status", "--porcelain", "--untracked-files=all", "--", str(folder))
    if sha is None or tracked is None or own is None:
        return {"sha": None, "dirty": None}
    return {"sha": sha.strip(), "dirty": bool(tracked or own)}


def git(folder: Path, *arguments: str, **environment: str) -> str | None:
    """What git prints of the checkout that holds `folder`; None outside of one or without git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, check=True, capture_output=True, timeout=30, env={**os.environ, **environment})
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="surrogateescape")


def torch_version() -> str | None:
    """`torch.__version__` without the import: with its CUDA, which the distribution's name needn't have."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        told = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^__version__ = '(.+)'$", told, re.MULTILINE)
    return found and found.group(1)
