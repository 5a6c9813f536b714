"""A SLURM of one machine, as far as submitit and run.py call it: `install` puts its commands into a folder for PATH.

Jobs are processes here. `$FAKE_SLURM/ID` holds a job's state; a job that `scontrol requeue` names runs once more when
it has ended. A job gets the variables that SLURM sets for one task.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sacct")

STATES = {"PENDING": "PD", "RUNNING": "R", "REQUEUED": "PD", "COMPLETING": "CG"}
KILL_WAIT = 5.0  # seconds from SIGTERM to SIGKILL
ONE_TASK = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
ONE_TASK |= {"SLURM_JOB_NAME": "gla", "SLURM_JOB_NODELIST": "here"}


def install(folder: Path) -> dict[str, str]:
    """The environment in which the commands are found."""
    (folder / "bin").mkdir()
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        script.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder / "jobs")}


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    (jobs() / "last.sh").write_text(text)
    if "--partition=closed" in text:
        sys.exit("sbatch: error: invalid partition specified: closed")
    found = re.search(r"#SBATCH --array=0-(\d+)%(\d+)", text)
    last, limit = (int(found[1]), int(found[2])) if found else (0, 1)
    most = jobs() / "most"
    if most.exists() and len(unfinished()) + last + 1 > int(most.read_text()):
        sys.exit("sbatch: error: AssocMaxSubmitJobLimit")
    first = f"{os.getpid()}"
    ids = [f"{first}_{i}" for i in range(last + 1)] if found else [first]
    for id in ids:
        (jobs() / id).write_text("PENDING")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # jobs are no children of sbatch's
    if not (jobs() / "busy").exists():  # else they wait
        subprocess.Popen(
            [sys.executable, __file__, "run", script, str(limit), *ids], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(f"Submitted batch job {first}")
    if (jobs() / "interrupt").exists():
        os.kill(os.getppid(), signal.SIGINT)


def run(script: str, limit: str, *ids: str) -> None:
    """The controller of one array."""
    waiting, running = list(ids), dict[str, subprocess.Popen[bytes]]()
    cancelled: dict[str, float] = {}
    while waiting or running:
        for id, process in list(running.items()):
            if state(id) == "CANCELLED" and time.time() > cancelled.setdefault(id, time.time()) + KILL_WAIT:
                tell(id, signal.SIGKILL)
            if process.poll() is not None:
                del running[id]
                if state(id) == "REQUEUED":
                    (jobs() / id).write_text("PENDING")
                    waiting.append(id)
                elif state(id) == "RUNNING":
                    (jobs() / id).write_text("FAILED" if process.returncode else "COMPLETED")
        waiting = [id for id in waiting if state(id) == "PENDING"]
        while waiting and len(running) < int(limit):
            id = waiting.pop(0)
            array, _, task = id.partition("_")
            env = {**os.environ, **ONE_TASK, "SLURM_JOB_ID": array}
            env |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {}
            running[id] = subprocess.Popen(["bash", script], env=env, start_new_session=True)
            (jobs() / id).write_text("RUNNING")
            (jobs() / f"{id}.pid").write_text(str(running[id].pid))
        time.sleep(0.05)


def srun(*arguments: str) -> None:
    rest = list(arguments)
    env = dict(os.environ)
    while rest[0].startswith("-"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            rest.pop(0)
    os.execvpe(rest[0], rest, env)


def squeue(*_: str) -> None:
    if (jobs() / "down").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    for id in ids():
        if state(id) in STATES:
            print(id, STATES[state(id)])


def unfinished() -> list[str]:
    return [id for id in ids() if state(id) in ("PENDING", "RUNNING", "REQUEUED")]


def scancel(*arguments: str) -> None:
    if (jobs() / "down").exists():
        sys.exit("scancel: error: Unable to contact slurm controller")
    failed = False
    with (jobs() / "scancel").open("a") as calls:
        print(*arguments, file=calls)
    number = signal.SIGKILL if "--signal=KILL" in arguments else signal.SIGTERM
    for argument in arguments:
        if argument.startswith("-"):
            continue
        found = re.fullmatch(r"(\d+)_\[(\d+)-(\d+)\]", argument)
        for id in [f"{found[1]}_{i}" for i in range(int(found[2]), int(found[3]) + 1)] if found else [argument]:
            failed = failed or id not in unfinished()
            (jobs() / id).write_text("CANCELLED")
            tell(id, number)
    if failed:
        sys.exit("scancel: error: Job/step already completing or completed")


def scontrol(_: str, id: str) -> None:
    (jobs() / id).write_text("REQUEUED")


def sacct(*arguments: str) -> None:
    with (jobs() / "sacct").open("a") as calls:
        print(*arguments, file=calls)
    for id in ids():
        if id.partition("_")[0] == arguments[-1]:
            print(f"{id}|{state(id)}")


def tell(id: str, number: int) -> None:
    """As SLURM does, to every process of the job: the tasks, and what they started in sessions of their own."""
    number_of = jobs() / f"{id}.pid"
    found = [int(number_of.read_text())] if number_of.exists() else []
    for pid in found:
        tasks = Path(f"/proc/{pid}/task/{pid}/children")
        found += [int(child) for child in tasks.read_text().split()] if tasks.exists() else []
    for pid in found[1:]:  # the batch script itself gets none
        os.kill(pid, number)


def jobs() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def ids() -> list[str]:
    return [path.name for path in jobs().iterdir() if path.name.replace("_", "").isdigit()]


def state(id: str) -> str:
    return (jobs() / id).read_text()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
