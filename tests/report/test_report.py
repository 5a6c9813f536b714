"""The whole report: its files, what they say, what is printed."""

import io
import json
import math
import subprocess
import sys
import warnings

import pandas as pd
import pytest
from rich.console import Console

from gla_ablate import report
from gla_ablate.report import effects, write_report

GATES = [{"name": "data_dependent", "rank": 16}, {"name": "fixed_decay"}, {"name": "none"}]
COLUMNS = [
    "metric",
    "mean",
    "std",
    "n",
    "delta",
    "params",
    "state_size",
    "flops_per_token",
    "tokens_per_s",
    "peak_mem_mb",
    "backend",
    "delta_low",
    "delta_high",
]
FILES = ["effects.csv", "pairs.csv", "report.html", "report.md", "results.csv", "trials.csv"]


def small_grid(folder):
    """Three gates at two seeds, their means 2.5, 2.25 and 2 and their std √2/16."""
    for gate, loss in zip(GATES, (2.5, 2.25, 2.0), strict=True):
        for seed in (0, 1):
            value = loss + (seed - 0.5) / 8
            folder.add({"model.gate": gate}, seed, {"train/loss": [4.0, 3.0, value], "val/loss": [3.0, value]})
    return folder.save({"baseline": {"model.gate.name": "none"}}, command="python run.py experiments/gating.yaml")


def printed(path, width=120, terminal=False):
    stream = io.StringIO()
    write_report(path, Console(file=stream, width=width, force_terminal=terminal, no_color=True))
    return stream.getvalue()


def files(path):
    return sorted(file.name for file in (path / "report").iterdir() if file.is_file())


def test_results_csv_has_the_contracts_columns_in_grid_order_and_full_precision(folder):
    path = small_grid(folder)
    write_report(path)
    table = pd.read_csv(path / "report/results.csv", keep_default_na=False)
    assert list(table.columns) == ["model.gate", *COLUMNS]
    assert table["model.gate"].tolist() == ["data_dependent rank=16", "fixed_decay", "none"]
    assert table["mean"].tolist() == [2.5, 2.25, 2.0]
    assert table["delta"].tolist() == [0.5, 0.25, 0.0]
    assert table["std"].tolist() == [pytest.approx(math.sqrt(2) / 16, abs=1e-15)] * 3
    assert table.iloc[0].tolist()[6:12] == [1_234_567, 16_384, 7.4e6, 41_200.0, 812.25, "torch"]
    # both seeds differ by the same, so that the interval is a point; the baseline needs none
    assert table["delta_low"].tolist() == table["delta_high"].tolist() == ["0.5", "0.25", ""]


def test_unknown_numbers_are_empty_cells_and_counts_stay_whole_numbers(folder):
    folder.add({"model.heads": 2}, 0, {"val/loss": [2.5]})
    folder.add({"model.heads": 4}, 0, status="queued")
    path = folder.save()
    write_report(path)
    assert (path / "report/results.csv").read_text().splitlines()[1:] == [
        "2,val/loss,2.5,,1,,1234567,16384,7400000.0,41200.0,812.25,torch,,",
        "4,val/loss,,,0,,,,,,,,,",
    ]


def test_trials_csv_has_a_row_per_trial_with_its_state(folder):
    folder.add({"a": True}, 0, {"val/loss": [2.5]})
    folder.add({"a": True}, 1, {"val/loss": [2.6]}, status="failed", reason="out of memory")
    folder.add({"a": False}, 0, status=None)
    path = folder.save()
    write_report(path)
    table = pd.read_csv(path / "report/trials.csv", dtype=str, keep_default_na=False)
    assert table[["a", "seed", "status", "reason", "value", "step", "data_sha256"]].to_numpy().tolist() == [
        ["true", "0", "finished", "", "2.5", "10", "ab" * 32],
        ["true", "1", "failed", "out of memory", "2.6", "10", "ab" * 32],
        ["false", "0", "not started", "", "", "", ""],
    ]


def test_report_md_opens_with_question_and_answer_and_holds_table_curves_and_command(folder):
    path = small_grid(folder)
    write_report(path)
    text = (path / "report/report.md").read_text()
    lines = [line for line in text.splitlines() if line]
    assert lines[:3] == [
        "# gating",
        "**Which gate gives the lowest `val/loss`?**",
        "Best: none, 2.000 ± 0.088 over 2 seeds. "
        "Next: fixed_decay, 0.250 behind (95 % interval 0.250 … 0.250 over 2 seeds).",
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in lines if line.startswith("|")]
    assert rows[0] == ["gate", "val/loss ↓", "Δ", "95 %", "n"]
    assert rows[2:5] == [
        ["none", "2.000 ± 0.088", "baseline", "", "2"],
        ["fixed_decay", "2.250 ± 0.088", "+0.250", "0.250 … 0.250", "2"],
        ["data_dependent", "2.500 ± 0.088", "+0.500", "0.500 … 0.500", "2"],
    ]
    assert "the same everywhere: data_dependent rank=16" in text
    assert "](curves.png)" in text and "](metric.png)" in text
    assert "```sh\npython run.py experiments/gating.yaml\n```" in text
    assert "Note." not in text and "don't count" not in text


def test_the_console_shows_the_same_table_best_first(folder):
    out = printed(small_grid(folder))
    order = [out.index(row) for row in ("none  ", "fixed_decay  ", "data_dependent  ")]
    assert order == sorted(order)
    assert "2.250 ± 0.088" in out and "+0.250" in out and "6 of 6 trials finished" in out
    assert str(folder.path / "report/report.md") in out


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_loses_spare_columns_but_never_part_of_a_cell(folder, width):
    out = printed(small_grid(folder), width, terminal=True)
    assert "…" not in out.replace("0.250 … 0.250", "").replace("0.500 … 0.500", "").split("Best:")[0]
    assert all(cell in out for cell in ("data_dependent", "2.500 ± 0.088", "+0.500"))
    assert ("FLOPs/token" in out) == (width == 200)


def test_off_a_terminal_no_column_is_lost_and_no_sentence_broken(folder):
    out = printed(small_grid(folder), width=40)
    assert "FLOPs/token" in out and "0.250 behind (95 % interval 0.250 … 0.250 over 2 seeds)." in out


@pytest.mark.parametrize(
    ("mode", "second", "said"),
    [
        # t(0.975, 1) = 12.706; seeds that differ by 0.1 have std 0.1 / √2 and a half-width of 0.635
        ("min", (2.05, 2.25), "0.050 behind (95 % interval 0.050 … 0.050 over 2 seeds)"),
        ("min", (2.05, 2.35), "0.100 behind (a tie: −0.535 … 0.735 over 2 seeds)"),
        ("max", (1.5, 1.7), "0.500 behind (95 % interval 0.500 … 0.500 over 2 seeds)"),
        ("max", (1.45, 1.75), "0.500 behind (a tie: −0.135 … 1.135 over 2 seeds)"),
    ],
)
def test_the_answer_says_whether_the_seeds_tell_the_first_two_apart(folder, mode, second, said):
    for a, values in ((1, (2.0, 2.2)), (2, second)):
        for seed, value in enumerate(values):
            folder.add({"a": a}, seed, {"val/loss": [value]})
    assert said in printed(folder.save({"mode": mode}))


def test_one_seed_gives_no_std_and_no_band(folder):
    for a, value in ((1, 2.0), (2, 3.0)):
        folder.add({"a": a}, 7, {"val/loss": [4.0, value]})
    out = printed(folder.save())
    assert "±" not in out and "Best: a=1, 2.000 over 1 seed. Next: a=2, 1.000 behind (one seed: no interval)." in out


def test_an_experiment_without_factors_is_reported_too(folder):
    for seed in (0, 1):
        folder.add({}, seed, {"val/loss": [2.0 + seed]})
    path = folder.save()
    out = printed(path)
    assert "2.500 ± 0.707 over 2 seeds" in out
    assert pd.read_csv(path / "report/results.csv").columns.tolist() == COLUMNS
    assert "What each factor does" not in (path / "report/report.md").read_text()
    assert [(path / "report" / name).read_text().count("\n") for name in ("effects.csv", "pairs.csv")] == [1, 1]


def test_all_failed_gives_no_answer_and_every_reason(folder):
    for seed in (0, 1):
        folder.add({"a": 1}, seed, {"val/loss": [3.0]}, status="failed", reason=f"loss is nan at step {seed}7")
    path = folder.save()
    out = printed(path)
    assert "No answer yet: 0 of 2 trials finished, 2 failed." in out
    text = (path / "report/report.md").read_text()
    assert "loss is nan at step 07" in text and "loss is nan at step 17" in text
    assert files(path) == ["curves.png", *FILES]  # what there is of the curves


@pytest.mark.parametrize("status", ["queued", None])
def test_nothing_started_is_a_report_without_plots(folder, status):
    for a in (1, 2):
        folder.add({"a": a}, status=status)
    path = folder.save()
    assert "No answer yet" in printed(path)
    assert files(path) == FILES


def test_trials_that_do_not_count_are_listed_failed_ones_first(folder):
    folder.add({"a": 1}, 0, {"val/loss": [3.0]})
    folder.add({"a": 1}, 1, status="queued")
    folder.add({"a": 1}, 2, {"val/loss": [math.nan]})
    folder.add({"a": 1}, 3, {"val/loss": [3.0]}, status="interrupted", reason="SIGTERM")
    folder.add({"a": 1}, 4, {"val/loss": [3.0]}, status="failed", reason="ValueError: a | b\nand <c> __d__")
    path = folder.save()
    out = printed(path)
    assert "2 of 5 trials finished, 1 failed, 1 interrupted, 1 queued" in out and "4 of 5 trials don't count" in out
    text = (path / "report/report.md").read_text()
    table = text[text.index("## Trials that don't count") :]
    rows = [line.split(" | ") for line in table.splitlines() if "the only point" in line]
    assert [row[2].strip() for row in rows] == ["failed", "finished", "interrupted", "queued"]
    assert rows[0][3].strip() == r"ValueError: a \| b and \<c> \_\_d\_\_"
    assert "val/loss is nan at step 10" in rows[1][3]
    assert "1/5" in text


def test_trials_that_log_different_metrics_are_averaged_only_where_they_have_it(folder):
    folder.add({"a": 1}, 0, {"val/loss": [3.0], "val/accuracy": [0.5]})
    folder.add({"a": 1}, 1, {"val/loss": [2.0]})
    out = printed(folder.save({"metric": "val/accuracy", "mode": "max"}))
    assert "0.5000 over 1 seed" in out and "logged no val/accuracy" in out and "1/2" in out


@pytest.mark.parametrize(
    ("stamp", "note"),
    [
        ({"data": {"name": "stdlib", "bytes": 1e6, "sha256": "cd" * 32}}, "did not all see the same data"),
        ({"git": {"sha": "f" * 40, "dirty": False}}, "did not all run the same code"),
        ({"git": {"sha": "0123456789abcdef0123456789abcdef01234567", "dirty": True}}, "with uncommitted changes"),
        ({"device": "NVIDIA H100"}, "did not all run on the same device: cpu"),
        ({"backend": "triton"}, "did not all use the same backend of the op"),
        ({"versions": {"torch": "2.13.0"}}, "did not all run with the same versions"),
    ],
)
def test_trials_that_ran_differently_are_noted_with_their_numbers(folder, stamp, note):
    for seed in (0, 1, 2):
        folder.add({"a": 1}, seed, {"val/loss": [3.0]}, stamp=stamp if seed == 2 else None)
    path = folder.save()
    out = printed(path)
    assert note in out and "(2 trials)" in out and "(1 trial)" in out
    assert "> **Note.** Trials did not all" in (path / "report/report.md").read_text()


def test_a_baseline_that_the_grid_lacks_is_noted(folder):
    folder.add({"a": 1}, 0, {"val/loss": [3.0]})
    assert "No point of the grid is the baseline b=2" in printed(folder.save({"baseline": {"b": 2}}))


def test_markup_and_dollars_in_values_are_shown_as_they_are(folder):
    for value in ("[red]x[/red]", "$a_1$", "a|b"):
        folder.add({"data.files": [value]}, 0, {"val/loss": [3.0, 2.0]})
    path = folder.save()
    out = printed(path)
    assert "files=[red]x[/red]" in out and "$a_1$" in out
    assert r"a\|b" in (path / "report/report.md").read_text()


def test_a_new_report_replaces_an_old_one_and_the_same_folder_gives_the_same_bytes(folder):
    path = small_grid(folder)
    write_report(path)
    before = {name: (path / "report" / name).read_bytes() for name in files(path)}
    write_report(path)
    assert {name: (path / "report" / name).read_bytes() for name in files(path)} == before
    for trial in path.glob("trial*"):
        (trial / "metrics.csv").unlink()
        (trial / "status.json").write_text(json.dumps({"status": "queued"}))
    write_report(path)
    assert files(path) == FILES  # old plots don't outlive their trials
    assert "No answer yet" in (path / "report/report.md").read_text()


def test_a_report_that_is_cut_off_while_writing_leaves_the_old_file_whole(folder, cut_off):
    path = small_grid(folder)
    write_report(path)
    before = (path / "report/results.csv").read_bytes()
    folder.add({"model.gate": {"name": "new"}}, 0, {"val/loss": [1.0]})
    folder.save()
    cut_off(lambda file: "results.csv" in file.name)
    with pytest.raises(KeyboardInterrupt):
        write_report(path)
    assert (path / "report/results.csv").read_bytes() == before


def test_a_report_leaves_the_trials_files_alone(folder):
    path = small_grid(folder)
    before = {file: file.stat().st_mtime_ns for file in path.glob("trial*/*")}
    write_report(path)
    assert {file: file.stat().st_mtime_ns for file in path.glob("trial*/*")} == before


def test_effects_and_the_document_are_made_once(folder, monkeypatch):
    made = []

    def counted(module, name):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: made.append(name) or make(*given))

    counted(effects, "main_effect")
    counted(report, "document")
    write_report(small_grid(folder))
    assert sorted(made) == ["document", "main_effect"]


def test_a_letter_that_the_font_lacks_is_no_warning(folder):
    for name in ("\N{PARROT}", "日本"):
        folder.add({"model.gate.name": name}, 0, {"val/loss": [2.0]})
    path = folder.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(path)


def test_a_negative_mean_has_a_true_minus(folder):
    for gate, loss in (("a", -1.5), ("b", 2.0)):
        folder.add({"model.gate.name": gate}, 0, {"val/loss": [loss]})
    out = printed(folder.save())
    assert " a     −1.500 " in out and " b      2.000 " in out and "Best: a, −1.500 over 1 seed" in out


def test_a_report_needs_neither_torch_nor_lightning():
    code = "import sys, gla_ablate.report; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    "content", [b"\n\n", b"\0" * 99, b"step,metric,value\n1,val/loss,1.0,2.0\n", b"step,metric,value\n\xff"]
)
def test_a_trial_whose_curves_are_damaged_does_not_count_and_says_so(folder, content):
    folder.add({"model.heads": 1}, curves={"val/loss": [2.0]})
    damaged = folder.add({"model.heads": 2}, curves={"val/loss": [1.0]})
    (damaged / "metrics.csv").write_bytes(content)
    write_report(folder.save())
    text = (folder.path / "report/report.md").read_text()
    wanted = (
        "logged no val/loss" if content.endswith(b"\xff") else "metrics.csv is damaged: the same command runs it again"
    )
    assert wanted in text and "2.000" in text


@pytest.mark.parametrize("left", ["step,metric,value\n10,val/loss,3.0\n", "step,metric,value\n", "", None], ids=str)
def test_a_finished_trial_whose_curves_were_cut_short_does_not_count(folder, left):
    told = {"metrics": {"val/loss": 1.5}}
    folder.add({"model.heads": 1}, curves={"val/loss": [3.0, 1.5]}, result=told)
    short = folder.add({"model.heads": 2}, curves={"val/loss": [3.0, 1.5]}, result=told)
    write_report(folder.save())
    assert "damaged" not in (folder.path / "report/report.md").read_text()
    (short / "metrics.csv").unlink() if left is None else (short / "metrics.csv").write_text(left)
    write_report(folder.path)
    text = (folder.path / "report/report.md").read_text()
    assert "metrics.csv is damaged: the same command runs it again" in text and "3.000" not in text
