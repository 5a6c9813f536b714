"""Which points are compared, what the comparison says, and what is written of it."""

from __future__ import annotations

import pandas as pd
import pytest

from gla_ablate.report import findings, page, tables, write_report
from gla_ablate.report.document import Heading, Table
from gla_ablate.report.findings import find
from gla_ablate.report.trials import load
from gla_ablate.report.words import answer, notes

GATE, HEADS = "model.gate.name", "model.heads"
# of two seeds, whose differences are ± 0.0625 around their mean: t(0.975, 1) / √2 · std = 12.7062 / √2 · 0.0625 √2
HALF = 12.706204736 * 0.0625
ROWS = [
    ({GATE: "a"}, {0: 1.0, 1: 2.0}),
    ({GATE: "b"}, {0: 1.5, 1: 2.625}),  # 0.5 and 0.625 more than a: mean 0.5625
    ({GATE: "c"}, {0: 3.0, 1: 4.0}),  # 2 more than a; 1.5 and 1.375 more than b
]


def found_in(folder, rows, report=None):
    folder.fill(rows)
    return find(load(folder.save(report)))


def verdicts(found):
    return [(p.first.values[GATE], p.second.values[GATE], p.verdict) for p in found.pairs]


def table(blocks, heading):
    """The first table after `heading`, as rows of text."""
    at = next(i for i, b in enumerate(blocks) if isinstance(b, Heading) and b.text == heading)
    columns = next(b for b in blocks[at:] if isinstance(b, Table)).columns
    return [[c.header for c in columns], *map(list, zip(*(c.cells for c in columns), strict=True))]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min", [("a", "b", "tie"), ("a", "c", "better"), ("b", "c", "better")]),
        ("max", [("c", "b", "better"), ("c", "a", "better"), ("b", "a", "tie")]),
    ],
)
def test_every_pair_of_points_is_compared_best_first(folder, mode, expected):
    assert verdicts(found_in(folder, ROWS, {"mode": mode})) == expected


def test_pairs_csv_has_differences_and_intervals_in_full_precision_and_places_in_results_csv(folder):
    folder.fill(ROWS[::-1])
    path = folder.save()
    write_report(path)
    pairs, results = (pd.read_csv(path / "report" / name) for name in ("pairs.csv", "results.csv"))
    assert list(pairs) == ["point", "other", "n", "difference", "low", "high", "verdict", "point_row", "other_row"]
    assert pairs[["point", "other"]].to_numpy().tolist() == [[a, b] for a, b in [("a", "b"), ("a", "c"), ("b", "c")]]
    assert pairs["difference"].tolist() == [-0.5625, -2.0, -1.4375]
    assert pairs["low"].tolist() == pytest.approx([-0.5625 - HALF, -2.0, -1.4375 - HALF])
    assert pairs["high"].tolist() == pytest.approx([-0.5625 + HALF, -2.0, -1.4375 + HALF])
    for row in pairs.to_dict("records"):
        first, second = results["mean"][row["point_row"]], results["mean"][row["other_row"]]
        assert first - second == pytest.approx(row["difference"])


def test_effects_csv_has_a_row_per_value_with_its_effect_against_the_reference(folder):
    folder.fill(ROWS)
    path = folder.save({"baseline": {GATE: "c"}})
    write_report(path)
    table = pd.read_csv(path / "report/effects.csv", keep_default_na=False, dtype=str)
    assert table.drop(columns=["low", "high"]).to_numpy().tolist() == [
        [GATE, "a", "c", "1.5", "-2.0", "better", "2", "1"],
        [GATE, "b", "c", "2.0625", "-1.4375", "better", "2", "1"],
        [GATE, "c", "c", "3.5", "", "reference", "", ""],
    ]
    assert float(table["low"][1]) == pytest.approx(-1.4375 - HALF)


def test_factors_that_vary_together_are_one_in_effects_csv(folder):
    folder.fill([({"dim": 1, "lr": True}, {0: 1.0}), ({"dim": 2, "lr": None}, {0: 2.0})])
    path = folder.save()
    write_report(path)
    assert (path / "report/effects.csv").read_text().splitlines()[1:] == [
        "dim + lr,dim=1 lr=true,dim=1 lr=true,1.0,,,,reference,,",
        "dim + lr,dim=2 lr=null,dim=1 lr=true,2.0,1.0,,,one seed,1,1",
    ]


def test_a_large_grid_compares_each_point_with_the_best_and_with_its_baseline(folder, monkeypatch):
    monkeypatch.setattr(findings, "ALL_PAIRS", 5)
    monkeypatch.setattr(page, "ALL_PAIRS", 5)
    rows = [({GATE: g, HEADS: h}, {0: h + 10.0 * (g == "none")}) for g in ("on", "none") for h in (1, 2, 3)]
    found = found_in(folder, rows, {"baseline": {GATE: "none"}})
    said = [tuple((p.values[GATE], p.values[HEADS]) for p in (pair.first, pair.second)) for pair in found.pairs]
    best, others = ("on", 1), [("on", 2), ("on", 3), ("none", 1), ("none", 2), ("none", 3)]
    assert said == [(best, other) for other in others] + [(("on", h), ("none", h)) for h in (2, 3)]
    assert "More than 5 points: each is compared with the best one and with its baseline" in "".join(
        word for word in page.how_far_to_trust(found) if isinstance(word, str)
    )


def test_a_small_grid_shows_all_pairs_side_by_side(folder):
    rows = table(page.document(found_in(folder, ROWS), []), "All pairs")
    assert rows == [
        ["row − column", "2", "3"],
        ["1 a", "tie −0.562", "−2.000"],
        ["2 b", "", "−1.438"],
    ]


def test_each_point_is_held_against_the_best_and_against_its_baseline(folder):
    blocks = page.document(found_in(folder, ROWS, {"baseline": {GATE: "c"}}), [])
    assert table(blocks, "Against the best, a") == [
        ["point", "difference", "95 %", "verdict", "seeds"],
        ["b", "+0.562", "−0.232 … 1.357", "tie", "2"],
        ["c", "+2.000", "2.000 … 2.000", "worse", "2"],
    ]
    assert table(blocks, "Against the baseline, c") == [
        ["point", "difference", "95 %", "verdict", "seeds"],
        ["a", "−2.000", "−2.000 … −2.000", "better", "2"],
        ["b", "−1.438", "−2.232 … −0.643", "better", "2"],
    ]


def test_the_table_of_results_names_a_tie_with_the_baseline(folder):
    columns = {c.header: c.cells for c in tables.results(found_in(folder, ROWS, {"baseline": {GATE: "b"}}))}
    assert columns["Δ"] == ["tie −0.562", "baseline", "+1.438"]
    assert columns["95 %"] == ["−1.357 … 0.232", "", "0.643 … 2.232"]


def test_a_difference_to_the_baseline_takes_the_seeds_that_both_have(folder):
    rows = [({GATE: "a"}, {0: 1.0, 1: 2.0}), ({GATE: "b"}, {0: 1.5, 1: None}), ({GATE: "c"}, {0: None, 1: 2.5})]
    found = found_in(folder, rows, {"baseline": {GATE: "b"}})
    assert [p.delta for p in found.shown] == [-0.5, 0.0, None]
    assert "Next: b, 0.500 behind (one seed: no interval)" in answer(found)
    assert verdicts(found) == [("a", "b", "one seed"), ("a", "c", "one seed"), ("b", "c", "no common seed")]


def test_one_seed_says_that_nothing_can_be_told_from_chance(folder):
    found = found_in(folder, [({GATE: "a"}, {0: 1.0}), ({GATE: "b"}, {0: 1.5})])
    said = "".join(word for word in page.how_far_to_trust(found) if isinstance(word, str))
    assert said.startswith("No two points have two seeds in common")
    assert [row[-2] for row in table(page.document(found, []), "Against the best, a")] == ["verdict", "one seed"]


def test_the_caveat_counts_the_comparisons(folder):
    said = "".join(word for word in page.how_far_to_trust(found_in(folder, ROWS)) if isinstance(word, str))
    assert "(1 of 3 pairs)" in said and "about 1 in 20 misses 0 all the same, here 0.1 of 3" in said


def sized(folder, report, **params):
    for gate, count in params.items():
        folder.fill([({GATE: gate}, {0: 1.0})], result={"params": count})
    return notes(find(load(folder.save(report))))


def test_points_that_differ_in_parameters_by_more_than_a_percent_are_noted(folder):
    (note,) = sized(folder, {"baseline": {GATE: "none"}}, none=100_000, a=101_000, b=95_000, c=103_000)
    assert note.startswith("b has 5.0 % fewer parameters than none (95.00k and 100.0k), the largest of 2 such")
    assert "parameters' doing" in note


def test_without_a_baseline_all_points_are_held_against_the_smallest(folder):
    (note,) = sized(folder, {}, a=102_000, b=100_000)
    assert note.startswith("a has 2.0 % more parameters than b (102.0k and 100.0k): ")


@pytest.mark.parametrize("report", [{}, {"baseline": {GATE: "a"}}])
def test_a_percent_of_the_parameters_is_no_difference(folder, report):
    assert sized(folder, report, a=100_000, b=101_000) == []


def test_a_long_table_ends_with_where_the_rest_is(folder):
    folder.fill([({"a": i}, {0: float(i)}) for i in range(page.ROWS + 1)])
    path = folder.save()
    write_report(path)
    text = (path / "report/report.md").read_text()
    assert f"The first {page.ROWS} of {page.ROWS + 1} rows; all are in [results.csv](results.csv)." in text
    assert len(pd.read_csv(path / "report/results.csv")) == page.ROWS + 1
