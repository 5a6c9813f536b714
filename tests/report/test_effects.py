"""Differences over seeds, and what a factor does with all else the same."""

from __future__ import annotations

import pytest

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
    assert fixed.effect is not None and fixed.effect.mean == pytest.approx(1.0) and fixed.settings == 2
    # every gate has heads = 2, so the means are those, and differ by the effects
    assert [level.mean for level in gate.levels] == pytest.approx([10.25, 9.2, 11.25])
    assert heads.levels[1].effect is not None and heads.levels[1].effect.mean == pytest.approx(10.0)
    assert heads.levels[1].settings == 2  # the gate that has heads = 4 not at all says nothing of heads


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


def test_a_level_that_never_meets_the_reference_has_no_effect(folder):
    rows = [({GATE: "a", HEADS: 2}, {0: 1.0}), ({GATE: "b", HEADS: 4}, {0: 2.0}), ({GATE: "a", HEADS: 4}, {0: None}),
            ({GATE: "c", HEADS: 8}, {0: 3.0})]  # fmt: skip
    _, _, (gate, heads) = grid_of(folder, rows)
    assert [level.effect for level in gate.levels] == [None, None, None]
    assert [level.mean for level in gate.levels] == [1.0, 2.0, 3.0]
    assert all(level.effect is None for level in heads.levels)
