import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gla_ablate.config import Config
from gla_ablate.experiment import Trial
from gla_ablate.launch.state import State
from gla_ablate.launch.view import LiveView, View, clock, make_view

ROOT = Path(__file__).resolve().parents[2]
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
        done = State("finished", step=200, max_steps=200, loss=1.5, seconds=65, setup=5, trained=60, first_step=1)
        view.ended(TRIALS[0], done)
        view.ended(TRIALS[1], State("failed", step=3, reason="loss is nan at step 3 [of 9]"))
    assert out.file.getvalue().splitlines() == [
        "started      trial-0",
        "finished     trial-0: 200 steps in 1:05, loss 1.500 (4 of 5 finished, about 1:05 left)",
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


SCRIPT = """
import time
from rich.console import Console
from gla_ablate.config import Config
from gla_ablate.experiment import Trial
from gla_ablate.launch.state import State
from gla_ablate.launch.view import make_view
trials = [Trial(f"a-trial-with-quite-a-long-name-{i:04}", {}, i, Config()) for i in range(1000)]
console = Console()
began = time.process_time()
with make_view(console, trials, 0, slots=4) as view:
    for trial in trials[:4]:
        view.started(trial)
    for step in range(2, 40):
        state = State("running", step, 200, 1.5, 20480.6, None, None, None, 9.0, 5.0, 4.0, 1)
        view.tick({trial.id: state for trial in trials[:4]})
        time.sleep(0.1)
        if step == 15:
            print("half", flush=True)
print(f"done {time.process_time() - began:.2f} s")
"""


def test_a_thousand_trials_fit_a_terminal_that_is_resized():
    """On a real one: after it has become smaller, no line of a frame is longer, and no frame higher."""
    master, slave = pty.openpty()
    resize(slave, 30, 120)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    text = b""
    small = None
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        text += block
        if small is None and b"half" in text:
            small = len(text)
            resize(master, 12, 80)
    os.close(master)
    assert process.wait(30) == 0
    frames = re.split(r"\x1b\[\d*[JA]|\x1b\[\?25[lh]", text.decode())
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).replace("\r", "") for frame in frames]
    assert any("left" in line and "trials not shown" in line for frame in plain for line in frame.splitlines())
    late = text[small + 4000 :].decode(errors="replace")  # frames drawn before the new size was seen are over by then
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", late).replace("\r", "\n").splitlines()
    assert len(lines) > 20 and max(map(len, lines)) <= 80
    assert float(re.search(r"done ([0-9.]+) s", text.decode()).group(1)) < 3.0  # of 4, spent drawing


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


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
