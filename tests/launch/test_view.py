from io import StringIO

import pytest
from rich.console import Console

from gla_ablate.config import Config
from gla_ablate.experiment import Trial
from gla_ablate.launch.state import State
from gla_ablate.launch.view import LiveView, View, clock, make_view

TRIALS = [Trial(f"trial-{i}", {}, i, Config()) for i in range(30)]
RUNNING = State("running", step=40, max_steps=200, loss=1.2345, tokens_per_s=20480.6, seconds=187)


def console(terminal: bool, height: int = 20, **environment: str) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=120, height=height, _environ=environment)


@pytest.mark.parametrize(
    ("terminal", "environment", "live"), [(True, {}, True), (False, {}, False), (True, {"TERM": "dumb"}, False)]
)
def test_the_table_is_live_on_a_terminal_alone(terminal, environment, live):
    assert isinstance(make_view(console(terminal, **environment), TRIALS, 0), LiveView) is live


def test_plain_lines_tell_starts_and_ends_and_nothing_in_between():
    out = console(False)
    with View(out, TRIALS[:2], finished=3) as view:
        view.started(TRIALS[0])
        for _ in range(50):
            view.tick({"trial-0": RUNNING})
        view.ended(TRIALS[0], State("finished", step=200, max_steps=200, loss=1.5, seconds=65))
        view.ended(TRIALS[1], State("failed", step=3, reason="loss is nan at step 3 [of 9]"))
    assert out.file.getvalue().splitlines() == [
        "started      trial-0",
        "finished     trial-0: 200 steps in 1:05, loss 1.500 (4 of 5 finished)",
        "failed       trial-1: loss is nan at step 3 [of 9] (4 of 5 finished)",
    ]


def test_the_live_table_shows_progress_and_keeps_running_trials_on_the_screen():
    out = console(False, height=12)
    view = LiveView(out, TRIALS, finished=0)
    view.tick({"trial-29": RUNNING})
    out.print(view.render())
    text = out.file.getvalue()
    assert "trial-29" in text and "40/200" in text and "1.234" in text and "20,481" in text and "3:07" in text
    assert "24 more trials not shown" in text
    assert len(text.splitlines()) <= 12


def test_a_failure_stays_readable_after_the_live_table_is_gone():
    out = console(True)
    with make_view(out, TRIALS[:1], 0) as view:
        view.started(TRIALS[0])
        view.ended(TRIALS[0], State("failed", reason="out of memory"))
    assert "trial-0: out of memory" in out.file.getvalue()


def test_no_color_is_honoured():
    out = console(True, NO_COLOR="1")
    with make_view(out, TRIALS[:1], 0) as view:
        view.ended(TRIALS[0], State("failed", reason="out of memory"))
    assert "\x1b[1;31m" not in out.file.getvalue() and "out of memory" in out.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3723, "1:02:03")])
def test_times_are_short(seconds, text):
    assert clock(seconds) == text
