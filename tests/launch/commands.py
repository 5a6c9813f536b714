"""`run.py` as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.test_kills import PAUSE

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """The command in a session of its own, in `folder`, on one thread a trial; `env` on top of the environment."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env}
    env["GLA_TEST_PAUSE"] = str(folder / PAUSE)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
