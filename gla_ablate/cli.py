"""The command: `python run.py EXPERIMENT.yaml [key=value …]`. Arguments in, exit code out.

0: all trials finished; 1: some trial failed; 2: a mistake in the command or the configuration; 130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from gla_ablate.arguments import check_company, parser, read_prompt
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Experiment, Trial, load_experiment, record, trials
from gla_ablate.interruption import ended_alike
from gla_ablate.status import read_json, write_json

OTHERS = 1.0  # seconds for a --status that looks whether the folder's lock is held
NAMED = 5  # trials that are named of those that don't belong to the grid any more
WIDTH_OF_A_LOG = 160  # columns of a table that isn't printed on a terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a `ConfigError` becomes one line on stderr."""
    try:
        with ended_alike():
            return _run(parser().parse_intermixed_args(arguments))
    except ConfigError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        from gla_ablate.trial import disk_is_full

        where = f"{error.filename}: " if error.filename else ""
        if disk_is_full(error):
            why = "no space left on the disk; the same command goes on once there is"
        elif where and error.strerror:  # a folder that can't be read, say
            why = error.strerror.lower()
        else:
            raise
        print(f"error: {where}{why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    # Late imports: torch takes seconds that --help and a mistyped file shouldn't cost, and pandas seconds that only
    # the report should.
    console = _console()
    check_company(given)
    if given.generate is not None:
        return _generate(given)
    if given.export is not None:
        return _export(given, console)
    if given.frozen:
        _check_frozen()
    _check_launcher(given)
    if given.experiment is not None and os.path.isdir(given.experiment):
        return _run_again(given, console)
    given.out = given.out or Path("runs")
    if given.experiment is None:
        if not given.list_gates:
            raise ConfigError("which experiment? (such as experiments/quickstart.yaml; see python run.py --help)")
    else:
        try:
            experiment = load_experiment(given.experiment, given.overrides, given.part)
            grid = trials(experiment)
        except RecursionError as error:
            raise ConfigError(f"{given.experiment}: nested too deeply") from error
    if given.list_gates:
        from gla_ablate.listing import print_gates

        print_gates(console)
        return 0
    if given.dry_run:
        from gla_ablate.launch.slots import divide
        from gla_ablate.listing import print_trials

        here = given.launcher == "local"
        print_trials(grid, console, given.out, divide(given.jobs, given.per_gpu if here else None))
        return 0
    folder = given.out / experiment.name
    for own in (folder, folder / "report"):
        if own.is_symlink():
            raise ConfigError(f"{own}: is a symbolic link, and nothing is written where one leads (--out may be one)")
    if given.status:
        from gla_ablate.launch.overview import print_status

        print_status(grid, folder, console)
        return 0
    code = 0
    if not given.report:
        code = _launch(experiment, grid, folder, given, console)
        if code == 130:
            return code
    elif (folder / "experiment.json").is_file():  # of an earlier call, perhaps for another grid or metric
        _record(experiment, grid, folder)
    if given.prepare:
        return code
    from gla_ablate.report import write_report

    write_report(folder, console)
    return code


def _generate(given: argparse.Namespace) -> int:
    """Go on with a text, from a trained trial's folder."""
    prompt = read_prompt(given)
    from gla_ablate.continuation import go_on

    options = {name: value for name in ("tokens", "temperature", "top_k", "top_p", "seed")
               if (value := getattr(given, name)) is not None}  # fmt: skip
    go_on(given.generate, prompt, **options)
    return 0


def _export(given: argparse.Namespace, console: Console) -> int:
    """Write a trained trial's weights for use elsewhere."""
    from gla_ablate.export import export
    from gla_ablate.loading import WEIGHTS

    if given.format == "fla":
        from gla_ablate.interop.fla import export_to_fla

        folder = export_to_fla(given.export, given.to)
    else:
        folder = export(given.export, given.to)
    size = (folder / WEIGHTS).stat().st_size / 2**20
    console.print(f"{folder / WEIGHTS}: {size:,.1f} MiB", highlight=False, markup=False, soft_wrap=True)
    return 0


def _check_launcher(given: argparse.Namespace) -> None:
    """That what is given goes with it."""
    if given.slurm and given.launcher != "slurm":
        raise ConfigError(f"--slurm: goes with --launcher slurm, not with {given.launcher}")
    if given.per_gpu and given.launcher == "slurm":
        raise ConfigError("--per-gpu: SLURM gives a job GPUs of its own (--slurm gpus_per_node=1), not a part of one")


def _check_frozen() -> None:
    from gla_ablate.stamp import PACKAGE, git_state

    state = git_state(PACKAGE)
    if state["sha"] is None:
        raise ConfigError(f"--frozen: {PACKAGE} is in no git checkout, so nobody could tell what ran")
    if state["dirty"]:
        raise ConfigError("--frozen: there are changes that are not committed (git status shows them)")


def _run_again(given: argparse.Namespace, console: Console) -> int:
    """The trial in the folder that was given."""
    from gla_ablate.launch.again import run_again

    elsewhere = given.launcher != "local"
    for name, value in {"key=value": given.overrides, "--part": given.part, "--launcher": elsewhere,
                        "--slurm": given.slurm, "--jobs": given.jobs, "--per-gpu": given.per_gpu, "--out": given.out,
                        "--retry-failed": given.retry_failed, "--fail-fast": given.fail_fast,
                        "--dry-run": given.dry_run, "--prepare": given.prepare, "--status": given.status,
                        "--report": given.report, "--list-gates": given.list_gates}.items():  # fmt: skip
        if value:
            raise ConfigError(f"{name}: a trial's folder ({given.experiment}) takes none; an experiment's YAML does")
    return run_again(given.experiment, console, given.max_retries)


def _record(experiment: Experiment, grid: list[Trial], folder: Path) -> None:
    """Note in `folder` what a report shall cover: this call's grid and settings."""
    words = [word for word in sys.argv if word != "--report"]
    write_json(folder / "experiment.json", record(experiment, grid, shlex.join(["python", *words])))


def _launch(
    experiment: Experiment, grid: list[Trial], folder: Path, given: argparse.Namespace, console: Console
) -> int:
    """Run what is left to run of `grid` in `folder`; the exit code."""
    from gla_ablate.launch.local import prepare, run_trials
    from gla_ablate.launch.overview import HOLDER, not_of, who
    from gla_ablate.launch.places import launcher
    from gla_ablate.launch.view import make_view
    from gla_ablate.trial import is_finished

    place_of = None if given.prepare else launcher(given.launcher, given.jobs, given.per_gpu, given.slurm, grid)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "run.lock")
        lock.acquire(timeout=OTHERS)
    except Timeout as error:
        holder = read_json(folder / HOLDER) or {}
        raise ConfigError(f"{folder}: another run.py is at work here{who(holder)}") from error
    except OSError as error:
        raise ConfigError(f"--out: {folder}: {(error.strerror or str(error)).lower()}") from error
    with lock, ExitStack() as stack:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = {"process": os.getpid(), "on": platform.node(), "since": now}
        write_json(folder / HOLDER, holder)

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)  # a folder's [name] is no style

        todo = prepare(grid, folder, given.retry_failed, say)
        _record(experiment, grid, folder)
        if place_of is None:
            (folder / HOLDER).unlink(missing_ok=True)
            for trial in todo:
                say(str(folder / trial.id))
            return 0
        done = sum(is_finished(folder / trial.id) for trial in grid)
        left = max(len(grid) - len(todo) - done, 0)
        skipped = f", {done} finished already" if done else ""
        skipped += f", {left} failed before (--retry-failed runs them again)" if left else ""
        at_once = ""
        if todo:  # else there is no need of a server that imports for seconds, or of a cluster
            place = stack.enter_context(place_of.open(todo, folder))
            at_once = f", {place.count} at a time{place.where}"
            write_json(folder / HOLDER, holder | {"slots": place.count})
        summary = f"{experiment.name}: {len(grid)} trials{skipped}{at_once}, in {folder}"
        say(summary)
        others = not_of(grid, folder)
        if others:
            names = ", ".join(others[:NAMED]) + ", …" * (len(others) > NAMED)
            say(f"{len(others)} trials there are not of this grid, and stay as they are: {names}")
        interrupted = False
        if todo:
            with make_view(console, todo, done, left, place.count) as view:
                options = {"max_retries": given.max_retries, "fail_fast": given.fail_fast}
                interrupted = run_trials(todo, folder, place.slots, view, place.start, **options)
        (folder / HOLDER).unlink(missing_ok=True)
    if interrupted:
        console.print("interrupted; the same command goes on with what is left", highlight=False)
        return 130
    return 0 if all(is_finished(folder / trial.id) for trial in grid) else 1


def _console() -> Console:
    """Where results go. Off a terminal nothing is folded to 80 columns."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDTH_OF_A_LOG if wide else None)
