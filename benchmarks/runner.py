"""What the runner costs: seconds to start a trial, to lay out a large grid, to report on many trials. On a CPU.

    python benchmarks/runner.py
    python benchmarks/runner.py --grid 10000 --report 1000

imports    `import gla_ablate.fit, datasets` in an interpreter of its own: the libraries, PyTorch and Lightning above
           all, of a trial on text
spawned    a trial of one step in an interpreter of its own, less the imports: all that the runner and one step add
forked     the same trial from the server that has imported everything, from asking for it until it has ended
grid       reading an experiment of so many points, checking and naming every one; again where values refer to others,
           one of them to a factor with half as many levels as there are points
report     `run.py --report` over so many trials that have finished, ten seeds a point, as a process; MiB at its peak
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EXPERIMENT = """name: cost
base: [model/tiny, data/stdlib, trainer/quick]
set: {{trainer.max_steps: {steps}, data.batch_size: 1, data.val_tokens: 256{more}}}
grid: {{optim.lr: [{rates}], model.gate.name: [none, fixed_decay]}}
seeds: [{seeds}]
"""
REFERRING = ", optim.warmup_steps: '${trainer.max_steps}', optim.weight_decay: '${optim.lr}'"
COPIED = ("metrics.csv", "result.json", "status.json", "stamp.json")


def experiment(folder: Path, trials: int, seeds: int = 1, steps: int = 1, more: str = "") -> Path:
    """A grid of at least so many trials: learning rates, two gates, seeds; `more` is set for all."""
    rates = ", ".join(f"{1e-6 * (i + 1):.6f}" for i in range(-(-trials // (2 * seeds))))
    file = folder / f"cost{trials}.yaml"
    file.write_text(EXPERIMENT.format(steps=steps, more=more, rates=rates, seeds=", ".join(map(str, range(seeds)))))
    return file


def seconds(call: Callable[[], object], times: int = 3) -> float:
    """The median."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def python(*arguments: object) -> float:
    """Runs it in an interpreter of its own; the MiB that it held at most."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_maxrss / 2**10


def fresh_trial(folder: Path) -> Path:
    """The folder of one more trial of one step, not yet run."""
    from gla_ablate.config import write_config
    from gla_ablate.experiment import load_experiment, trials

    trial = trials(load_experiment(experiment(folder, 1)))[0]
    home = Path(tempfile.mkdtemp(dir=folder))
    write_config(trial.config, home / "config.yaml")
    return home


def starts(folder: Path) -> dict[str, float]:
    from gla_ablate.launch.processes import Fork

    imports = seconds(lambda: python("-c", "import gla_ablate.fit, datasets"), 5)
    spawned = seconds(lambda: python("-m", "gla_ablate.trial", fresh_trial(folder)), 5)
    fork = Fork()

    def forked() -> None:
        home = fresh_trial(folder)
        with open(home / "log.txt", "ab") as log:
            process = fork(home, {"OMP_NUM_THREADS": "1"}, log)
        while process.poll() is None:
            time.sleep(0.005)
        assert (home / "result.json").exists(), (home / "log.txt").read_text()

    forked()  # waits until the server has imported everything
    return {"imports": imports, "spawned, beyond imports": spawned - imports, "forked, in all": seconds(forked, 5)}


def laid_out(folder: Path, count: int, more: str = "") -> tuple[int, float]:
    from gla_ablate.experiment import load_experiment, trials

    file = experiment(folder, count, more=more)
    start = time.perf_counter()
    found = trials(load_experiment(file))
    return len(found), time.perf_counter() - start


def reported(folder: Path, count: int) -> tuple[int, float, float]:
    """Trials, seconds, MiB. All are copies of one that has run."""
    from gla_ablate.config import write_config
    from gla_ablate.experiment import load_experiment, record, trials
    from gla_ablate.status import write_json

    file = experiment(folder, count, seeds=10, steps=250)
    parsed = load_experiment(file)
    grid = trials(parsed)
    home = folder / "runs" / parsed.name
    first = home / grid[0].id
    first.mkdir(parents=True)
    write_config(grid[0].config, first / "config.yaml")
    python("-m", "gla_ablate.trial", first)
    for trial in grid[1:]:
        (home / trial.id).mkdir()
        write_config(trial.config, home / trial.id / "config.yaml")
        for name in COPIED:
            shutil.copy(first / name, home / trial.id / name)
    write_json(home / "experiment.json", record(parsed, grid, "python benchmarks/runner.py"))
    start = time.perf_counter()
    most = python(ROOT / "run.py", file, "--out", folder / "runs", "--report")
    return len(grid), time.perf_counter() - start, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=10_000, metavar="TRIALS")
    parser.add_argument("--report", type=int, default=1000, metavar="TRIALS")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| what | seconds | MiB |\n|---|---|---|")
        for what, taken in starts(folder).items():
            print(f"| {what} | {taken:.2f} | |", flush=True)
        for what, more in {"": "", " with references": REFERRING}.items():
            count, taken = laid_out(folder, options.grid, more)
            print(f"| a grid of {count:,} trials{what} | {taken:.2f} | |", flush=True)
        count, taken, most = reported(folder, options.report)
        print(f"| a report on {count:,} trials | {taken:.2f} | {most:.0f} |", flush=True)


if __name__ == "__main__":
    main()
