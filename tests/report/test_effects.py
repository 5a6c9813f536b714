"""Differences over seeds, and what a factor does with all else the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gla_ablate.report import write_report
from gla_ablate.report.balance import balanced, rectangle
from gla_ablate.report.effects import Effect, main_effects, together
from gla_ablate.report.labels import Labels
from gla_ablate.report.points import Point, points
from gla_ablate.report.trials import load

GATE, HEADS = "model.gate.name", "model.heads"


def grid_of(folder, rows, report=None) -> tuple[list[Point], Labels, list[Effect]]:
    """`rows`: a point and its metric by seed."""
    folder.fill(rows)
    experiment = load(folder.save(report))
    grid = points(experiment)
    labels = Labels(experiment.factors, [point.values for point in grid])
    return grid, labels, main_effects(grid, labels, experiment.settings)


def test_a_main_effect_holds_all_else_the_same(folder):
    """Heads move the metric by 10 and the gate by 1; a point is missing, and mustn't mix the two."""
    rows = [
        ({GATE: "none", HEADS: 2}, {0: 10.0, 1: 10.5}),
        ({GATE: "none", HEADS: 4}, {0: 20.0, 1: 20.5}),
        ({GATE: "data", HEADS: 2}, {0: 9.0, 1: 9.4}),
        ({GATE: "fixed", HEADS: 2}, {0: 11.0, 1: 11.5}),
        ({GATE: "fixed", HEADS: 4}, {0: 21.0, 1: 21.5}),
    ]
    _, _, (gate, heads) = grid_of(folder, rows, {"baseline": {GATE: "none"}})
    assert gate.factors == (GATE,) and [level.values[GATE] for level in gate.levels] == ["none", "data", "fixed"]
    none, data, fixed = gate.levels
    assert gate.reference == 0 and none.effect is None
    assert data.effect is not None and data.effect.mean == pytest.approx(-1.05) and data.settings == 1
    assert fixed.effect is not None and fixed.effect.mean == pytest.approx(1.0) and fixed.settings == 1
    # every gate has heads = 2, so that all are compared there, and the means differ by the effects
    assert [level.mean for level in gate.levels] == pytest.approx([10.25, 9.2, 11.25])
    assert heads.levels[1].effect is not None and heads.levels[1].effect.mean == pytest.approx(10.0)
    assert heads.levels[1].settings == 2  # the gate that has heads = 4 not at all says nothing of heads
    assert (gate.without, heads.without, gate.unused, heads.unused) == ([{HEADS: 4}], [{GATE: "data"}], 4, 2)


def test_the_reference_is_the_baselines_value(folder):
    rows = [({"model.gate": {"name": name}}, {0: 1.0}) for name in ("data", "fixed", "none")]
    _, _, (gate,) = grid_of(folder, rows, {"baseline": {"model.gate": {"name": "none"}}})
    assert gate.reference == 2


@pytest.mark.parametrize("baseline", [{}, {HEADS: 8}, {GATE: "x"}])
def test_without_such_a_value_it_is_the_first(folder, baseline):
    _, _, (gate,) = grid_of(folder, [({GATE: "a"}, {0: 1.0}), ({GATE: "b"}, {0: 1.0})], {"baseline": baseline})
    assert gate.reference == 0


def test_factors_that_vary_together_stand_as_one(folder):
    rows = [
        ({"model.dim": dim, "optim.lr": lr, GATE: gate}, {0: dim / 100, 1: dim / 100})
        for dim, lr in ((128, 1e-3), (256, 5e-4))
        for gate in ("a", "b")
    ]
    grid, labels, (size, gate) = grid_of(folder, rows)
    assert size.factors == ("model.dim", "optim.lr") and gate.factors == (GATE,)
    assert together(grid, labels.varying) == [("model.dim", "optim.lr"), (GATE,)]
    assert size.levels[1].effect is not None and size.levels[1].effect.mean == pytest.approx(1.28)
    assert gate.levels[1].effect is not None and gate.levels[1].effect.tie is True


def test_a_factor_that_follows_another_stands_with_it(folder):
    """As tasks of different lengths have it: a length is never compared at one task, but tasks are at one gate."""
    rows = [
        ({"data.name": task, "data.seq_len": length, GATE: gate}, {k: worse + k / 8 for k in range(2)})
        for task, length, worse in (("copying", 64, 1.0), ("recall", 128, 2.0), ("induction", 64, 4.0))
        for gate in ("a", "b")
    ]
    grid, labels, (task, gate) = grid_of(folder, rows)
    assert together(grid, labels.varying) == [("data.name", "data.seq_len"), (GATE,)]
    assert [level.mean for level in task.levels] == [1.0625, 2.0625, 4.0625]
    assert task.levels[2].effect is not None and task.levels[2].effect.mean == 3.0
    assert gate.settings == 3 and gate.levels[1].effect is not None and gate.levels[1].effect.tie is True


def test_one_that_follows_two_stands_with_the_first_alone(folder):
    """In rows that are no grid, each names the third."""
    rows = [
        ({HEADS: heads, GATE: gate, "model.dim": dim}, {0: 1.0})
        for heads, gate, dim in ((2, "a", 64), (2, "b", 64), (4, "c", 128), (8, "c", 128))
    ]
    grid, labels, effects = grid_of(folder, rows)
    assert together(grid, labels.varying) == [(HEADS, "model.dim"), (GATE,)]
    assert [effect.factors for effect in effects] == [(HEADS, "model.dim"), (GATE,)]


def test_a_level_that_never_meets_the_reference_has_no_effect(folder):
    rows = [({GATE: "a", HEADS: 2}, {0: 1.0}), ({GATE: "b", HEADS: 4}, {0: 2.0}), ({GATE: "a", HEADS: 4}, {0: None}),
            ({GATE: "c", HEADS: 8}, {0: 3.0})]  # fmt: skip
    _, _, (gate, heads) = grid_of(folder, rows)
    assert [level.effect for level in gate.levels] == [None, None, None]
    # nor means that could be compared: they would be over other heads
    assert [level.mean for level in gate.levels] == [1.0, None, None]
    assert all(level.effect is None for level in heads.levels)


def crossed(gates, missing, step=(1.0, 2.0, 6.0)):
    """Gates × heads 2, 4, 8 × seeds 0, 1, 2; the i-th gate is worse than the first by i · `step` of the heads."""
    return [
        (
            {GATE: gate, HEADS: heads},
            {k: None if (gate, heads, k) in missing else 10.0 * j + i * step[j] + k / 8 for k in range(3)},
        )
        for i, gate in enumerate(gates)
        for j, heads in enumerate((2, 4, 8))
    ]


def test_where_a_seeds_trial_is_missing_every_seed_is_still_over_the_same_settings(folder):
    """b is worse by 1, 2 and 6, by the heads; of one seed the trial at 2 heads is missing."""
    _, _, (gate, _) = grid_of(folder, crossed("ab", {("b", 2, 1)}))
    a, b = gate.levels
    assert b.effect is not None and (b.effect.mean, b.effect.low, b.effect.high, b.effect.n) == (4.0, 4.0, 4.0, 3)
    assert b.mean is not None and a.mean is not None and b.mean - a.mean == 4.0
    assert (gate.without, gate.without_seeds, gate.unused, b.settings) == ([{HEADS: 2}], [], 5, 2)


def test_levels_that_share_most_trials_with_the_reference_are_compared_first(folder):
    missing = {("b", 8, seed) for seed in range(3)} | {("c", 2, 1), ("c", 2, 2)}
    _, _, (gate, _) = grid_of(folder, crossed("abc", missing))
    assert [level.apart for level in gate.levels] == [False, True, False]


def test_a_seed_that_most_settings_miss_is_left_out_rather_than_they(folder):
    _, _, (gate, _) = grid_of(folder, crossed("ab", {("b", 2, 1), ("a", 8, 1)}))
    assert (gate.without, gate.without_seeds, gate.unused) == ([], [1], 4)
    assert gate.levels[1].effect is not None and gate.levels[1].effect.mean == 3.0 and gate.levels[1].effect.n == 2


def test_a_level_with_little_in_common_stands_apart_and_leaves_the_rest_whole(folder):
    """c is there at 8 heads alone, where the metric is 20 more: its mean would say that it is the worst by far."""
    missing = {("c", heads, seed) for heads in (2, 4) for seed in range(3)}
    _, _, (gate, _) = grid_of(folder, crossed("abc", missing, step=(1.0, 1.0, 1.0)))
    a, b, c = gate.levels
    assert [(x.apart, x.settings, x.effect.mean) for x in (b, c) if x.effect] == [(False, 3, 1.0), (True, 1, 2.0)]
    assert c.mean is None and a.mean == 10.125 and (gate.without, gate.unused) == ([], 0)


def test_a_reference_without_a_trial_leaves_means_and_no_effects(folder):
    _, _, (gate, _) = grid_of(folder, crossed("abc", {("a", h, k) for h in (2, 4, 8) for k in range(3)}))
    assert [level.mean for level in gate.levels] == [None, 13.125, 16.125]
    assert all(level.effect is None for level in gate.levels)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_missing_an_effect_is_the_difference_of_two_means_over_one_block(folder, seed):
    rng = np.random.default_rng(seed)
    share = rng.choice([0.05, 0.2, 0.5])
    rows = [
        ({"a": a, "b": b, "c": c}, {k: None if rng.random() < share else rng.normal() for k in range(3)})
        for a, b, c in itertools.product(range(3), range(3), range(2))
    ]
    _, _, effects = grid_of(folder, rows)
    for effect in effects:
        counts = {(level.settings, level.effect.n) for level in effect.levels if level.effect and not level.apart}
        assert len(counts) <= 1 and all(level.mean is None for level in effect.levels if level.apart)
        base = effect.levels[effect.reference].mean
        for level in effect.levels:
            if level.effect and not level.apart:
                assert level.mean - base == pytest.approx(level.effect.mean)
                assert level.settings == effect.settings - len(effect.without)
                assert level.effect.n == effect.seeds - len(effect.without_seeds)


@pytest.mark.parametrize(
    ("counted", "settings", "seeds"),
    [
        ([[1, 1], [1, 1]], [1, 1], [1, 1]),
        ([[1, 1], [1, 0]], [1, 0], [1, 1]),  # two trials either way: both seeds
        ([[1, 1, 0]], [1], [1, 1, 0]),
        ([[1, 1, 0], [1, 1, 0], [1, 1, 1]], [1, 1, 1], [1, 1, 0]),
        ([[1, 1, 1], [1, 1, 1], [0, 0, 1]], [1, 1, 0], [1, 1, 1]),
        ([[0, 0], [0, 0]], [0, 0], [0, 0]),
        ([[1, 0], [0, 1]], [1, 0], [1, 0]),
    ],
)
def test_what_lacks_the_largest_share_is_left_out_first(counted, settings, seeds):
    assert [side.astype(int).tolist() for side in rectangle(np.array(counted, bool))] == [settings, seeds]


def test_a_block_is_full_whatever_is_missing_and_empty_only_if_all_is():
    for seed in range(200):
        counted = np.random.default_rng(seed).random((4, 5, 3)) < (seed % 10) / 9
        block = balanced(counted, anchor=seed % 4)
        assert all(block.of(counted[member]).all() for member in np.flatnonzero(block.members))
        assert block.members[seed % 4] and (block.size > 0) == counted[seed % 4].any()


def test_the_page_says_beneath_the_table_what_was_left_out(folder):
    missing = {("b", 2, 1)} | {("c", heads, seed) for heads in (2, 4) for seed in range(3)}
    folder.fill(crossed("abc", missing))
    path = folder.save()
    write_report(path)
    page = (path / "report/report.md").read_text()
    section = page[page.index("### gate") : page.index("### heads")]
    assert section.splitlines()[-4:] == [
        "Over 2 of 3 settings of the other factors and 3 of 3 seeds, which all values but c have. "
        "Left out: heads=2; 5 trials that would count.",
        "",
        "Too little in common with the rest for a mean, and held against the reference alone: c.",
        "",
    ]


def test_the_page_tells_a_level_that_never_meets_the_reference(folder):
    pairs = ((1, 1), (1, 2), (2, 3), (3, 3))
    folder.fill(({"a": a, "b": b, "c": c}, {0: a + b + c, 1: a + b + c}) for a, b in pairs for c in (1, 2))
    path = folder.save()
    write_report(path)
    page = (path / "report/report.md").read_text()
    section = page[page.index("### b") : page.index("### c")]
    assert "never beside it" in section and "held against the reference alone" not in section
    assert "Never beside the reference with all else, and the seed, the same: b=3." in section
    assert "no common seed" not in (path / "report/effects.csv").read_text()


def test_a_level_without_trials_is_none_of_those_that_have_all_settings(folder):
    folder.fill(crossed("ab", {("b", 2, 1)}))
    folder.add({GATE: "c", HEADS: 2}, 0, status="queued")
    path = folder.save()
    write_report(path)
    assert "3 of 3 seeds, which all values with trials have. Left out" in (path / "report/report.md").read_text()


def test_a_whole_grid_leaves_nothing_out_and_says_nothing_of_it(folder):
    folder.fill(crossed("abc", set()))
    path = folder.save()
    write_report(path)
    page = (path / "report/report.md").read_text()
    assert "### gate" in page and "Left out" not in page and "held against the reference alone" not in page
