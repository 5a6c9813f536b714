"""What a user sees while trials run: one live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gla_ablate.experiment import Trial
from gla_ablate.launch.forecast import Forecast
from gla_ablate.launch.state import State
from gla_ablate.status import FAILED

NOT_STARTED = "not started"  # in place of "queued", of a trial that nothing is there of and nobody is about to start
STYLES = {"running": "cyan", "finished": "green", "interrupted": "yellow", "queued": "dim", NOT_STARTED: "dim"}
STYLES |= dict.fromkeys(FAILED, "bold red")
REST = 66  # columns of a terminal that all but a trial's name take at most
SHOWN_FIRST = ("running", *FAILED, "interrupted", "queued", "finished")  # when not all trials fit on the screen


class View:
    """Plain lines: a trial's start, its end, nothing in between."""

    def __init__(self, console: Console, trials: list[Trial], finished: int, left: int = 0, slots: int = 1) -> None:
        """`trials` will run, `slots` at a time; `finished` more of the grid were done before, and `left` are left as
        they are."""
        self.console = console
        self.forecast = Forecast(trials, slots)
        self.total = len(trials) + finished + left
        self.finished = finished
        self.began = time.monotonic()
        self.states = {trial.id: State(max_steps=trial.config.trainer.max_steps) for trial in trials}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)

    def started(self, trial: Trial) -> None:
        self.states[trial.id].status = "running"
        self.say(f"started      {trial.id}")

    def ended(self, trial: Trial, state: State, log: Sequence[str] = ()) -> None:
        """`log`: its last lines, of one that failed."""
        self.states[trial.id] = state
        self.finished += state.status == "finished"
        self.say(f"{styled(state.status, 12)} {trial.id}: {escape(outcome(state))} ({self.count()}{self.left()})")
        self.quote(log)

    def quote(self, log: Sequence[str]) -> None:
        for line in log:
            self.say(f"[dim]    {escape(line)}[/]")

    def stopping(self, running: int) -> None:
        if running:
            trials, them = ("trial", "it") if running == 1 else ("trials", "them")
            self.say(f"[yellow]stopping {running} running {trials}; Ctrl-C to kill {them}[/]")

    def tick(self, running: dict[str, State]) -> None:
        self.states |= running

    def count(self) -> str:
        return f"{self.finished} of {self.total} finished"

    def left(self) -> str:
        """The grid's own time left, once it can be told."""
        seconds = self.forecast.of_grid(self.states)
        return f", about {clock(seconds)} left" if seconds and seconds >= 1 else ""


class LiveView(View):
    """A table that is drawn over itself, with a row per trial as far as the screen reaches."""

    def __enter__(self) -> Self:
        self.live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4, transient=True)
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def started(self, trial: Trial) -> None:
        self.states[trial.id].status = "running"

    def ended(self, trial: Trial, state: State, log: Sequence[str] = ()) -> None:
        self.states[trial.id] = state
        self.finished += state.status == "finished"
        if state.status in FAILED:  # stays above the table when it has scrolled out of it
            self.say(f"{styled(state.status)} {trial.id}: {escape(outcome(state))}")
            self.quote(log)

    def render(self) -> Group:
        rows = sorted(self.states.items(), key=lambda item: SHOWN_FIRST.index(item[1].status))
        room = max(3, self.console.height - 6)
        table = progress_table(self.console.width)
        for id, state in rows if len(rows) <= room else rows[:room]:
            add_progress(table, id, state, self.forecast.of_trial(state))
        hidden = f", {len(rows) - room} more trials not shown" if len(rows) > room else ""
        elapsed = clock(time.monotonic() - self.began)
        line = f"{self.count()} after {elapsed}{self.left()}{hidden} · Ctrl-C stops, the same command goes on"
        return Group(table, Text(line, overflow="ellipsis", no_wrap=True))


def progress_table(width: int) -> Table:
    """Without rows. A trial's name gets what the other columns leave it of `width`, on one line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", no_wrap=True, overflow="ellipsis", max_width=max(width - REST, 8))
    table.add_column("status", no_wrap=True)
    for name in ("step", "loss", "tokens/s", "time", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_progress(table: Table, id: str, state: State, left: float | None) -> None:
    table.add_row(
        Text(id),
        Text(state.status, style=STYLES[state.status]),
        f"{state.step}/{state.max_steps}",
        number(state.loss, ".3f"),
        number(state.tokens_per_s, ",.0f"),
        clock(state.seconds),
        "" if left is None else clock(left),
    )


def make_view(console: Console, trials: list[Trial], finished: int, left: int = 0, slots: int = 1) -> View:
    live = console.is_terminal and not console.is_dumb_terminal
    return (LiveView if live else View)(console, trials, finished, left, slots)


def styled(status: str, width: int = 0) -> str:
    return f"[{STYLES[status]}]{status:<{width}}[/]"


def outcome(state: State) -> str:
    """How a trial ended, in a line."""
    if state.status == "finished":
        return f"{state.step} steps in {clock(state.seconds)}, loss {number(state.loss, '.3f')}"
    return state.reason or f"at step {state.step}"


def number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def clock(seconds: float) -> str:
    """`3:07`, or `1:02:03` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
