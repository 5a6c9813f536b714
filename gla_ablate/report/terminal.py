"""The report's short form on a terminal: the table, and what a reader must know about it."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gla_ablate.report import tables
from gla_ablate.report.document import Column
from gla_ablate.report.equality import check
from gla_ablate.report.findings import Findings
from gla_ablate.report.words import answer, notes
from gla_ablate.status import FAILED

LISTED = 10  # unfinished trials that are listed; report.md has more
ROWS = 100  # of the table


def show(console: Console, found: Findings, where: str) -> None:
    """`where` is the path of the full report."""
    experiment = found.experiment

    def say(*texts: Text) -> None:
        console.print(*texts, sep="", soft_wrap=not console.is_terminal)  # a log keeps a sentence on one line

    say(Text(f"\n{experiment.name}", style="bold"), Text(f" · {tables.tally(experiment.trials)}"))
    print_table(console, [column._replace(cells=column.cells[:ROWS]) for column in tables.results(found)])
    if len(found.shown) > ROWS:
        say(Text(f"the first {ROWS} of {len(found.shown):,} points"))
    say(Text(answer(found)))
    held = check(found)
    if held:
        say(Text(held.text, style={"passed": "green", "failed": "bold red", "open": "yellow"}[held.verdict]))
    for note in notes(found):
        say(Text(note, style="yellow"))
    left = tables.leftovers(experiment)
    for trial in left[:LISTED]:
        colour = "red" if trial.status in (*FAILED, "finished") else "yellow"
        reason = f": {trial.reason}" if trial.reason else ""
        at = found.all_labels.point(trial.point)
        say(Text(trial.status, style=colour), Text(f" {at}, seed {trial.seed}{reason}"))
    if len(left) > LISTED:
        say(Text(f"and {len(left) - LISTED} more"))
    console.print(Text(f"report: {where} and report.html"), soft_wrap=True)


def print_table(console: Console, columns: list[Column]) -> None:
    """All columns where there is no terminal, as many as fit where there is one; never a cell cut short."""
    spare = sorted({column.spare for column in columns if column.spare})
    for dropped in [0, *spare]:
        kept = [column for column in columns if not 0 < column.spare <= dropped]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in kept:
            table.add_column(Text(column.header), justify="right" if column.right else "left", no_wrap=True)
        for row in zip(*(column.cells for column in kept), strict=True):
            table.add_row(*map(Text, row))
        table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        if table.width <= console.width or not console.is_terminal:
            break
    console.print(table, crop=False)
