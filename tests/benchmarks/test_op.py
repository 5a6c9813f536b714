"""The benchmark's own arithmetic and honesty: floors, what counts as right, what a row without a result says."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import floors
import forms
import measure
import op
import plot
import rivals
import table
from measure import Row
from shapes import KINDS, SHAPES, Shape, fixed_decay

SMALL = Shape("small", 2, 48, 3, 16, 32)
PLAIN = floors.Ceilings(bandwidth=1e12, rate=1e15)
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def window(monkeypatch):
    """A window shorter than `SMALL`, so that tokens, a sequence and, of three heads, one lie outside of it."""
    monkeypatch.setattr(measure, "WINDOW", 32)
    monkeypatch.setattr(measure, "HEADS", 2)


def right(name=rivals.OURS, kind="channel", shape=SMALL, **values):
    measured = {
        "first_s": 1.5,
        "forward_ms": 0.5,
        "both_ms": 2.0,
        "forward_replay_ms": 0.25,
        "replay_ms": 1.0,
        "extra_mib": 100.0,
    }
    return Row(name, shape, kind, "usual", **{"errors": dict.fromkeys(measure.NAMES, 1e-3)} | measured | values)


def test_the_floor_of_bytes_is_what_a_hand_counts():
    # 1.3B: 16 · 2048 · 4 = 131,072 token-heads, each with q, k of 256 and v, o of 512 in 2 bytes, g of 256 in 4
    forward = 131_072 * (2 * 2 * 256 + 2 * 2 * 512 + 4 * 256)
    backward = forward + 131_072 * (2 * 2 * 256 + 2 * 512 + 4 * 256)  # reads do in place of writing o; dq, dk, dv, dg
    assert floors.floor_ms(SHAPES["1.3B"], "channel", PLAIN) == pytest.approx(
        (forward / 1e9, (forward + backward) / 1e9)
    )
    assert forward == 536_870_912 and backward == 939_524_096


def test_the_floor_of_operations_is_what_a_hand_counts():
    slow = floors.Ceilings(bandwidth=1e18, rate=1e12)
    assert floors.floor_ms(SHAPES["1.3B"], "none", slow) == pytest.approx((68.719476736, 3 * 68.719476736))


def test_more_of_a_gate_never_lowers_the_floor():
    found = [floors.floor_ms(SMALL, kind, PLAIN) for kind in KINDS]
    assert found == sorted(found) and found[0] < found[2] < found[3]


@pytest.mark.parametrize("name", rivals.OWN)
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_is_right_in_the_window_of_a_full_call(kind, name):
    _, errors = measure.check(rivals.load(name, kind), measure.pose(SMALL, kind, "usual", "cpu"))
    assert set(errors) == set(measure.NAMES) - ({"dg"} if kind == "none" else set())
    assert all(error < measure.LIMIT for error in errors.values()), errors


@pytest.mark.parametrize("B", [1, 2, 16])
def test_packed_sequences_hold_the_same_tokens_in_other_lengths(B):
    ends = rivals.offsets(B, 100, torch.device("cpu")).tolist()
    assert len(ends) == B + 1 and ends[:2] == [0, 100] and ends[-1] == 100 * B and ends == sorted(ends)
    assert B < 3 or any(end % 64 for end in ends[2:-1])


def forgets_the_gate(q, k, v, g):
    return rivals.ours(q, k, v)


def breaks_outside_the_window(q, k, v, g):
    o = rivals.ours(q, k, v, g)
    return torch.cat((o[:, :-1], o[:, -1:] * math.inf), 1)


def has_a_wrong_dg(q, k, v, g):
    return rivals.ours(q, k, v, g + 0.1 * (g - g.detach()))


@pytest.mark.parametrize("broken", [forgets_the_gate, breaks_outside_the_window, has_a_wrong_dg])
def test_a_wrong_op_gets_no_speed(broken):
    row = Row(rivals.OURS, SMALL, "token", "usual")
    measure.fill(row, broken, measure.pose(SMALL, "token", "usual", "cpu"))
    assert row.note == "wrong" and row.errors
    assert (row.first_s, row.forward_ms, row.both_ms, row.extra_mib) == (None,) * 4
    assert "wrong" in table.render(row)


def test_softmax_is_compared_with_its_plain_form_on_the_same_hidden_width():
    shape = Shape("wide", 1, 48, 2, 32, 128).softmax()
    assert (shape.H, shape.K, shape.V) == (2, 128, 128)
    _, errors = measure.check(rivals.load("flash", "softmax"), measure.pose(shape, "softmax", "usual", "cpu"))
    assert list(errors) == ["o", "dq", "dk", "dv"] and all(error < measure.LIMIT for error in errors.values())


def test_the_fixed_decay_is_retnets():
    assert fixed_decay(3, "cpu").exp().tolist() == pytest.approx([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])


def test_a_row_shows_what_it_has_and_why_it_lacks_the_rest():
    full, fla = right(), right("fla", forward_ms=1.0, both_ms=3.0, forward_replay_ms=0.5, replay_ms=None)
    compared = {}
    op.compare(fla, compared, PLAIN)
    op.compare(full, compared, PLAIN)
    floor, _ = floors.floor_ms(SMALL, "channel", PLAIN)
    assert table.render(full).endswith("| 2.00× / 1.50× | 2.00× / – |")
    assert f"| {floor / 0.25:.0%} / " in table.render(full) and f"| {floor / 1.0:.0%} / " in table.render(fla)
    failed = right(note="failed: OutOfMemoryError: of 9 GiB", errors={"o": None, "dq": 0.5})
    cells = [cell.strip() for cell in table.render(failed).split("|")[1:-1]]
    assert cells[:8] == ["small", "channel", rivals.OURS, "not finite", "5.0e-01", "–", "–", "–"]
    assert cells[8:] == ["failed: OutOfMemoryError: of 9 GiB", *[""] * 8]
    assert (
        len({table.render(row).count("|") for row in (full, fla, failed)} | {table.line(table.COLUMNS).count("|")}) == 1
    )


def test_a_wrong_rival_is_no_measure():
    compared = {}
    for row in (right("fla", note="wrong"), ours := right()):
        op.compare(row, compared, PLAIN)
    assert ours.fla_both is None


def test_every_row_is_on_disk_before_the_next_begins_and_a_failure_stops_none(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "op.json", []

    def fill(row, *_):
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        if row.kind == "none":
            raise RuntimeError("no | kernel\nimage")
        row.both_ms = row.forward_ms = 1.0

    monkeypatch.setattr(measure, "fill", fill)
    steps = op.plan([SMALL], ["channel", "none", "token"], [])
    assert not op.run(steps, "usual", PLAIN, {"rows": []}, out, device="cpu")
    rows = json.loads(out.read_text())["rows"]
    assert seen == [0, 1, 2] and [row["kind"] for row in rows] == ["channel", "none", "token"]
    assert rows[1]["note"] == "failed: RuntimeError: no / kernel" and rows[2]["note"] == ""
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3


def test_a_spent_budget_names_what_is_left_out(tmp_path, capsys):
    record = {"rows": []}
    op.run(op.plan([SMALL], ["none"], ["fla", "cudnn"]), "usual", PLAIN, record, tmp_path / "op.json", deadline=0.0)
    assert record["left_out"] == ["small none fla", "small none gla_ablate", "small softmax cudnn"]
    assert json.loads((tmp_path / "op.json").read_text()) == record
    assert "small softmax cudnn" in capsys.readouterr().out


def test_a_rival_that_is_not_installed_is_named_with_the_reason(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)
    assert "fla" in rivals.missing("fla")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--shapes", "340M", "2B"], "--shapes: got '2B', takes 340M, 1.3B, long, "),
        (["--rivals", "fla,mamba"], "--rivals: got 'mamba', takes "),
        (["--kinds", "scalar"], "--kinds"),
    ],
)
def test_an_unknown_name_is_refused_with_what_would_be_valid(given, message, capsys):
    with pytest.raises(SystemExit) as stop:
        op.arguments(given)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_forms_run_on_a_cpu(tmp_path):
    out, image = tmp_path / "forms.json", tmp_path / "forms.png"
    command = [sys.executable, Path(op.__file__), "--forms", "--lengths", "16", "40", "--out", out, "--plot", image]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    names = ["recurrent", "parallel", "chunkwise", "two-level", "op, torch, fp32"]
    assert [(row["form"], row["T"]) for row in record["rows"]] == [(name, T) for T in (16, 40) for name in names]
    assert all(row["error"] < 1e-5 and row["ms"] > 0 for row in record["rows"])
    assert {"device", "versions", "git", "command"} <= set(record["stamp"])
    assert done.stdout.count("\n| ") == 1 + len(record["rows"]) and image.read_bytes().startswith(PNG)


def test_a_form_that_would_need_too_much_stops_there(monkeypatch):
    monkeypatch.setattr(forms, "MEMORY", 2**20)
    record = {"rows": []}
    assert forms.run([8, 256, 512], record, None)
    found = [(row["T"], row["note"]) for row in record["rows"] if row["form"] == "parallel"]
    assert found[0] == (8, "") and len(found) == 2 and found[1][1].startswith("stops: needs")


def test_a_figure_takes_rows_without_a_speed_and_refuses_none_with_one():
    sweep = [right(shape=Shape(f"T{T}", 32768 // T, T, 4, 256, 512), both_ms=T / 99) for T in (512, 1024)]
    shape = right("fla", shape=SHAPES["340M"], floor_both_ms=0.2)
    wrong = Row(rivals.OURS, SHAPES["340M"], "channel", "usual", note="wrong")
    rows = [asdict(row) for row in (*sweep, shape, wrong)]
    assert plot.draw({"forms": False, "rows": rows}).startswith(PNG)
    with pytest.raises(ValueError, match="no row has a speed"):
        plot.draw({"forms": False, "rows": [asdict(wrong)]})
