"""`report: {best_over: …}`: each variant at its best value of what isn't in question."""

from __future__ import annotations

import io
import math

import pandas as pd
import pytest
from rich.console import Console

from gla_ablate.report import write_report
from gla_ablate.report.best import choices
from gla_ablate.report.findings import find
from gla_ablate.report.trials import load
from gla_ablate.report.words import answer, notes

GATE, RATE = "model.gate.name", "optim.lr"
# gate a is best at the middle rate, gate b at the largest; at each rate b is better than a, but at its best a wins
LOSSES = {("a", 1e-3): 2.0, ("a", 2e-3): 1.0, ("a", 4e-3): 3.0, ("b", 1e-3): 1.75, ("b", 2e-3): 1.5, ("b", 4e-3): 1.25}


def swept(folder, losses=LOSSES, **report):
    folder.fill([({GATE: gate, RATE: rate}, {0: loss, 1: loss + 0.5}) for (gate, rate), loss in losses.items()])
    return find(load(folder.save({"best_over": [RATE], **report})))


def test_each_variant_is_compared_at_its_best_value(folder):
    found = swept(folder)
    assert [p.values for p in found.shown] == [{GATE: "a", RATE: 2e-3}, {GATE: "b", RATE: 4e-3}]
    assert len(found.grid) == 6 and len(found.pairs) == 1 and [e.factors for e in found.effects] == [(GATE,)]
    assert answer(found).startswith("Best: a with lr=0.002, 1.250 ± 0.354 over 2 seeds. Next: b, 0.250 behind")


def test_the_best_is_the_highest_where_the_metric_is_good_when_high(folder):
    assert [p.values[RATE] for p in swept(folder, mode="max").shown] == [4e-3, 1e-3]


def test_the_baseline_is_at_its_own_best(folder):
    found = swept(folder, baseline={GATE: "b"})
    a, b = found.shown
    assert (a.baseline, a.delta, b.is_baseline) == ({GATE: "b", RATE: 4e-3}, -0.25, True)
    # while the grid itself holds each point against the one with the same rate
    assert [p.delta for p in found.grid] == [0.25, -0.5, 1.75, 0.0, 0.0, 0.0]


def test_the_best_at_the_edge_of_what_was_tried_is_noted(folder):
    found = swept(folder)
    assert [variant.edge(RATE) for variant in found.variants] == ["", "largest"]
    assert notes(found) == ["The best lr of b is the largest tried: a better one may lie beyond."]


def test_a_value_that_diverged_was_tried(folder):
    for status, curves in (("diverged", None), ("finished", {"val/loss": [math.nan]})):
        folder.add({GATE: "b", RATE: 8e-3}, 0, curves, status=status)
    assert notes(swept(folder)) == []


@pytest.mark.parametrize("status", ["queued", "running", "out of memory"])
def test_a_value_that_has_no_answer_yet_was_not(folder, status):
    folder.add({GATE: "b", RATE: 8e-3}, 0, status=status)
    assert "largest" in notes(swept(folder))[0]


@pytest.mark.parametrize("values", [["x", "y"], [True, False], [{"name": "m"}, {"name": "n"}], [{"name": "m"}, 1, 2]])
def test_values_without_an_order_have_no_edge(folder, values):
    folder.fill([({"a": a, "x": value}, {0: 1.0 + i}) for a in (1, 2) for i, value in enumerate(values)])
    found = find(load(folder.save({"best_over": ["x"]})))
    assert [p.values["x"] for p in found.shown] == [values[0]] * 2 and notes(found) == []


def test_one_value_for_each_variant_is_no_choice(folder):
    found = swept(folder, {("a", 1e-3): 2.0, ("b", 2e-3): 1.0})
    assert notes(found) == ["Each variant has one lr: there was none to choose."]


def test_the_best_over_two_factors_is_one_pair_of_values(folder):
    folder.fill([({GATE: g, RATE: r, "wd": w}, {0: r * w}) for g in "ab" for r in (2, 1) for w in (-1, 1)])
    found = find(load(folder.save({"best_over": [RATE, "wd"]})))
    assert [p.values for p in found.shown] == [{GATE: g, RATE: 2, "wd": -1} for g in "ab"]
    assert [variant.edge(RATE) for variant in found.variants] == ["largest"] * 2
    assert choices(found.grid, found.experiment.settings) == [{RATE: r, "wd": w} for r in (1, 2) for w in (-1, 1)]


def test_where_nothing_is_varied_but_what_is_chosen_there_is_one_point(folder):
    folder.fill([({RATE: rate}, {0: loss}) for rate, loss in ((1e-3, 2.0), (2e-3, 1.0), (4e-3, 3.0))])
    path = folder.save({"best_over": [RATE]})
    out = io.StringIO()
    write_report(path, Console(file=out, width=150))
    assert "Best: lr=0.002, 1.000 over 1 seed.\n" in out.getvalue()
    assert "**What `val/loss` does it reach at its best lr?**" in (path / "report/report.md").read_text()


def test_a_best_point_with_fewer_seeds_than_the_grid_is_noted(folder):
    folder.fill([({GATE: "c", RATE: rate}, {0: 0.5, 1: None}) for rate in (1e-3, 2e-3, 4e-3)])
    first, *_ = notes(swept(folder))
    assert first.startswith("Fewer seeds count than the grid has: 1/2 of c, each at its best lr.")


def test_a_better_value_with_fewer_seeds_is_noted_and_not_chosen(folder):
    folder.fill([({GATE: "a", RATE: 3e-3}, {0: 0.5, 1: None}), ({GATE: "b", RATE: 3e-3}, {0: 9.0, 1: None})])
    found = swept(folder)
    assert found.shown[0].values == {GATE: "a", RATE: 2e-3}
    said = "Better by the mean, but over fewer seeds and so not chosen: lr=0.003 of a (1/2)."
    assert notes(found) == [said, "The best lr of b is the largest tried: a better one may lie beyond."]


def test_best_csv_has_the_differences_that_the_page_shows(folder):
    folder.add({GATE: "b", RATE: 8e-3}, 0, status="diverged")
    swept(folder, baseline={GATE: "b"})
    path = folder.path
    write_report(path)
    best, results = (pd.read_csv(path / "report" / name) for name in ("best.csv", "results.csv"))
    assert list(best) == [*results, "tried"]
    assert best[[GATE, RATE, "mean", "delta", "tried"]].to_numpy().tolist() == [
        ["b", 4e-3, 1.5, 0.0, 4],
        ["a", 2e-3, 1.25, -0.25, 3],
    ]
    page = (path / "report/report.md").read_text()
    assert "−0.250 |" in page  # while results.csv has at the same rate
    assert results.loc[(results[GATE] == "a") & (results[RATE] == 2e-3), "delta"].tolist() == [-0.5]
    assert "all else the same, each at its best lr, seed by seed" in page
    assert (
        "In full precision: [best.csv](best.csv), [trials.csv](trials.csv); "
        "and every point, its difference to the baseline at the same lr, [results.csv](results.csv)."
    ) in page


def test_without_best_over_an_earlier_best_csv_is_removed(folder):
    swept(folder)
    write_report(folder.path)
    assert (folder.path / "report/best.csv").exists()
    write_report(folder.save({}))
    assert not (folder.path / "report/best.csv").exists()


def test_a_variant_without_a_finished_trial_has_no_best(folder):
    folder.fill([({GATE: "c", RATE: rate}, {0: None}) for rate in (1e-3, 2e-3)])
    found = swept(folder)
    assert [p.mean is None for p in found.shown] == [True, False, False] and not found.variants[0].edge(RATE)


def test_the_report_shows_every_value_tried_and_results_csv_every_point(folder):
    swept(folder)
    path = folder.path
    write_report(path)
    text = (path / "report/report.md").read_text()
    assert "**Which gate gives the lowest `val/loss` at its best lr?**" in text
    section = text[text.index("## Best lr for each variant") : text.index("## What each factor does")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    std = "± 0.354"
    assert rows[:1] + rows[2:] == [
        ["gate", "best lr", "edge", "lr=0.001", "lr=0.002", "lr=0.004"],
        ["a", "0.002", "", f"2.250 {std}", f"1.250 {std}", f"3.250 {std}"],
        ["b", "0.004", "largest tried", f"2.000 {std}", f"1.750 {std}", f"1.500 {std}"],
    ]
    assert "chosen by the same `val/loss` that is reported, which flatters every variant" in section
    results = pd.read_csv(path / "report/results.csv")
    assert list(results)[:2] == [GATE, RATE] and len(results) == 6
    pairs = pd.read_csv(path / "report/pairs.csv")
    assert pairs[["point", "other", "point_row", "other_row"]].to_numpy().tolist() == [["a", "b", 1, 5]]
