"""The report in words: `report.md`, and its short form on a terminal."""

from __future__ import annotations

import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from gla_ablate.report.labels import Labels, decimals, signed, value_text
from gla_ablate.report.points import Point, ranked
from gla_ablate.report.provenance import WORDS, differences, provenance, shares
from gla_ablate.report.tables import Column, leftovers, results, tally
from gla_ablate.report.trials import Experiment, Settings
from gla_ablate.status import FAILED

LISTED = 10  # unfinished trials that the terminal lists; report.md has them all


def markdown(experiment: Experiment, grid: list[Point], labels: Labels, plots: dict[str, str]) -> str:
    """`report.md`; `plots` maps a PNG's name beside it to its caption."""
    columns, left = results(experiment, grid, labels), leftovers(experiment)
    found = provenance(experiment.trials)
    parts = [f"# {escape(experiment.name)}", question(experiment, labels), escape(answer(experiment, grid, labels))]
    parts += [f"> **Note.** {escape(warning)}" for warning in notes(experiment, grid)]
    parts += ["## Results", pipes(columns), legend(experiment, columns, labels)]
    if plots:
        parts += ["## Curves", *(f"![{Path(name).stem}]({name})\n\n*{caption}*" for name, caption in plots.items())]
    if left:
        about = [
            Column("trial", [labels.point(trial.point) for trial in left]),
            Column("seed", [str(trial.seed) for trial in left], right=True),
            Column("status", [trial.status for trial in left]),
            Column("reason", [trial.reason for trial in left]),
            Column("folder", [trial.id for trial in left]),
        ]
        parts += ["## Trials that don't count", pipes(about)]
    if any(found.values()):
        lines = [f"- {WORDS[aspect][0]}: {escape(shares(texts))}" for aspect, texts in found.items()]
        parts += ["## How the trials ran", "\n".join(lines)]
    if experiment.command:
        parts += ["## Reproduce", f"```sh\n{experiment.command}\n```"]
    return "\n\n".join(parts) + "\n"


def show(console: Console, experiment: Experiment, grid: list[Point], labels: Labels, where: str) -> None:
    """The table, then what a reader must know about it; `where` is the path of the full report."""

    def say(*texts: Text) -> None:
        console.print(*texts, sep="", soft_wrap=not console.is_terminal)  # a log keeps a sentence on one line

    say(Text(f"\n{experiment.name}", style="bold"), Text(f" · {tally(experiment.trials)}"))
    print_table(console, results(experiment, grid, labels))
    say(Text(answer(experiment, grid, labels)))
    for warning in notes(experiment, grid):
        say(Text(warning, style="yellow"))
    left = leftovers(experiment)
    for trial in left[:LISTED]:
        colour = "red" if trial.status in (*FAILED, "finished") else "yellow"
        reason = f": {trial.reason}" if trial.reason else ""
        say(Text(trial.status, style=colour), Text(f" {labels.point(trial.point)}, seed {trial.seed}{reason}"))
    if len(left) > LISTED:
        say(Text(f"and {len(left) - LISTED} more"))
    console.print(Text(f"report: {where}"), soft_wrap=True)


def notes(experiment: Experiment, grid: list[Point]) -> list[str]:
    """What a reader must know before trusting the table."""
    candidates = [experiment.hint(), baseline_hint(experiment, grid), *differences(provenance(experiment.trials))]
    return [note for note in candidates if note]


def print_table(console: Console, columns: list[Column]) -> None:
    """All columns where there is no terminal, as many as fit where there is one; never a cell cut short."""
    spare = sorted({column.spare for column in columns if column.spare})
    for dropped in [0, *spare]:
        kept = [column for column in columns if not 0 < column.spare <= dropped]
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in kept:
            table.add_column(Text(column.header), justify="right" if column.right else "left", no_wrap=True)
        for row in zip(*(column.cells for column in kept), strict=True):
            table.add_row(*map(Text, row))
        table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        if table.width <= console.width or not console.is_terminal:
            break
    console.print(table, crop=False)


def question(experiment: Experiment, labels: Labels) -> str:
    settings = experiment.settings
    asked = " × ".join(labels.headers[f] for f in labels.varying)
    end = "lowest" if settings.mode == "min" else "highest"
    if not asked:
        return f"**What `{settings.metric}` does it reach?**"
    return f"**Which {asked} gives the {end} `{settings.metric}`?**"


def answer(experiment: Experiment, grid: list[Point], labels: Labels) -> str:
    """The best point, how far it is from its baseline and from the next, and whether the seeds tell the two apart."""
    first, *rest = ranked(grid, experiment.settings)
    if first.mean is None:
        return f"No answer yet: {tally(experiment.trials)}."
    places = decimals([p.mean for p in grid], [p.std for p in grid])
    spread = "" if first.std is None else f" ± {first.std:.{places}f}"
    sentences = [f"Best: {labels.point(first.values)}, {first.mean:.{places}f}{spread} over {seeds(first.n)}"]
    if first.delta is not None and not first.is_baseline and first.baseline is not None:
        sentences[0] += f", {signed(first.delta, places)} against {labels.point(first.baseline)}"
    if rest and rest[0].mean is not None:
        gap, judged = abs(rest[0].mean - first.mean), how_sure(first, rest[0], experiment.settings)
        sentences.append(f"Next: {labels.point(rest[0].values)}, {gap:.{places}f} behind ({judged})")
    unfinished = sum(not trial.counts for trial in experiment.trials)
    if unfinished:
        sentences.append(f"{unfinished} of {len(experiment.trials)} trials don't count (below)")
    return ". ".join(sentences) + "."


def how_sure(first: Point, second: Point, settings: Settings) -> str:
    """What the seeds say of the gap between two points: against their spread, and seed by seed, since trials of one
    seed share batches and the initial weights that both have."""
    stds = [std for std in (first.std, second.std) if std is not None]
    if not stds or first.mean is None or second.mean is None:
        return "one seed each"
    sign = 1 if settings.mode == "min" else -1
    shared = first.by_seed.keys() & second.by_seed.keys()
    agree = sum(sign * (second.by_seed[seed] - first.by_seed[seed]) > 0 for seed in shared)
    than = "more" if abs(second.mean - first.mean) > max(stds) else "no more"
    return f"{than} than the std over seeds" + (f"; {agree} of {len(shared)} seeds agree" if shared else "")


def seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def legend(experiment: Experiment, columns: list[Column], labels: Labels) -> str:
    """What the table's columns mean and what its labels leave out."""
    settings = experiment.settings
    meanings = {
        "Δ": f"difference to the one point with {baseline_text(settings)} and all else the same; empty without one",
        "state": "numbers in the recurrent state of all layers for one sequence",
        "FLOPs/token": "forward and backward, counted from the shapes",
        "tokens/s": "median over a trial's training steps, mean over seeds",
        "peak MB": "largest over seeds",
    }
    shown = {column.header for column in columns}
    lines = [f"{settings.metric}: the {settings.pick} value of each trial; mean ± sample std over n seeds"]
    lines += [f"{header}: {meaning}" for header, meaning in meanings.items() if header in shown]
    if labels.constants():
        lines.append(f"the same everywhere: {', '.join(labels.constants())}")
    text = "\n".join(f"- {escape(line)}" for line in lines)
    return f"{text}\n\nIn full precision: [results.csv](results.csv), [trials.csv](trials.csv)."


def baseline_hint(experiment: Experiment, grid: list[Point]) -> str:
    """What to say when the experiment names a baseline and the grid has none."""
    if not experiment.settings.baseline or any(p.baseline for p in grid):
        return ""
    return f"No point of the grid is the baseline {baseline_text(experiment.settings)}: no differences."


def baseline_text(settings: Settings) -> str:
    return " ".join(f"{key}={value_text(value)}" for key, value in settings.baseline.items())


def pipes(columns: list[Column]) -> str:
    """A Markdown table whose source lines up too."""
    padded = []
    for column in columns:
        cells = [escape(cell) for cell in (column.header, *column.cells)]
        width = max(3, *map(len, cells))
        rule = "-" * (width - 1) + ":" if column.right else "-" * width
        padded.append([c.rjust(width) if column.right else c.ljust(width) for c in (cells[0], rule, *cells[1:])])
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*padded, strict=True))


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"[\\|*`<\[]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(text.splitlines()))
