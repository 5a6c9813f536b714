"""What a Ray worker runs to hold one trial's process. It is sent there by value, and needs the standard library alone:
the trial's own environment says where this package is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading


class Host:
    """Its methods run in threads beside each other. Linux ends the process (`GLA_ABLATE_PARENT`) when the thread that
    started it ends, which is when the worker does."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def run(self, home: str, folder: str, given: dict[str, str]) -> int:
        """Run the trial in `home`, in the working directory `folder`, with what it prints appended to its log; its
        return code. `given` is laid over the worker's environment, in which Ray names its GPU."""
        with open(os.path.join(home, "log.txt"), "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gla_ablate.trial", home],
                cwd=folder,
                env={**os.environ, **given, "GLA_ABLATE_PARENT": str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.begun.set()
        return self.process.wait()

    def wait_until_begun(self) -> None:
        self.begun.wait()

    def send(self, number: int) -> None:
        """A signal to the process."""
        self.process.send_signal(number)
