"""What forked trials do in tests of how they are forked: note how they run, and then what their folder's name says.

Imports little, so that servers and forks begin at once.
"""

import json
import os
import sys
import time
from pathlib import Path

from gla_ablate.launch import processes
from gla_ablate.stamp import Code

VARIABLE = "GLA_ABLATE_OF_A_TEST"
real_run = processes.run


def run(home: str, slot: dict[str, str], log: str, code: Code) -> None:
    """In place of `processes.run`."""
    import gla_ablate.trial

    def trial(arguments: list[str]) -> int:
        folder = Path(arguments[0])
        threads, parent = os.environ["OMP_NUM_THREADS"], int(os.environ["GLA_ABLATE_PARENT"])
        note = {"pid": os.getpid(), "session": os.getsid(0), "threads": threads, "parent": parent}
        gla_ablate.trial.die_with_parent()
        (folder / "note.json").write_text(
            json.dumps(note | {"lightning": "lightning" in sys.modules, "variable": os.environ.get(VARIABLE)})
        )
        print("printed")
        os.write(2, b"to the descriptor\n")
        if folder.name.startswith("waits"):
            time.sleep(60)
        return int(folder.name) if folder.name.isdigit() else 7

    gla_ablate.trial.main = trial
    real_run(home, slot, log, code)


def begin(start: processes.Start, home: Path) -> processes.Process | None:
    home.mkdir()
    with open(home / "log.txt", "ab") as log:
        return start(home, {"OMP_NUM_THREADS": "3"}, log)
