"""The baseline of each point, and what is said where there is none."""

from __future__ import annotations

import pytest
import yaml

from gla_ablate.report.baselines import with_baselines
from gla_ablate.report.findings import find
from gla_ablate.report.points import points
from gla_ablate.report.trials import load
from gla_ablate.report.words import notes

GATE, RATE = "model.gate.name", "optim.lr"


def configured(folder, rows, baseline):
    """`rows`: a gate's point, its loss, None for a trial that waits, and the rest of its config, None before it has
    one. The points' differences to their baselines, and the notes."""
    for point, loss, config in rows:
        curves, status = ({"val/loss": [loss]}, "finished") if loss is not None else (None, "queued")
        trial = folder.add(point, 0, curves, status=status)
        if config is not None:
            (trial / "config.yaml").write_text(yaml.safe_dump(config))
    experiment = load(folder.save({"baseline": baseline}))
    grid = with_baselines(points(experiment), experiment.settings)
    return [point.delta for point in grid], notes(find(experiment))


def at(rate):
    return {"optim": {"lr": rate, "weight_decay": 0.1}, "model": {"gate": {"name": "of no matter"}}}


@pytest.mark.parametrize("baseline", [{GATE: "none", RATE: 1e-3}, {"model": {"gate": {"name": "none"}}, RATE: 0.001}])
def test_a_key_that_the_grid_does_not_vary_is_no_obstacle(folder, baseline):
    rows = [({GATE: "a"}, 1.0, at(1e-3)), ({GATE: "none"}, 2.0, at(1e-3))]
    assert configured(folder, rows, baseline) == ([-1.0, 0.0], [])


def test_a_whole_number_in_the_yaml_is_the_same_as_in_the_config(folder):
    rows = [({GATE: "a"}, 1.0, at(1.0)), ({GATE: "none"}, 2.0, at(1.0))]
    assert configured(folder, rows, {GATE: "none", RATE: 1}) == ([-1.0, 0.0], [])


def test_trials_that_have_no_config_yet_do_not_count_against_it(folder):
    rows = [({GATE: "a"}, 1.0, at(1e-3)), ({GATE: "b"}, 1.5, at(1e-3)), ({GATE: "none"}, None, None)]
    assert configured(folder, rows, {GATE: "none", RATE: 1e-3}) == ([None, None, None], [])


def test_a_value_that_no_trial_has_is_said(folder):
    rows = [({GATE: "a"}, 1.0, at(3e-3)), ({GATE: "none"}, 2.0, at(3e-3))]
    differences, said = configured(folder, rows, {GATE: "none", RATE: 1e-3})
    assert differences == [None, None]
    assert said == [
        "No point of the grid is the baseline model.gate.name=none optim.lr=0.001: no differences. "
        "The grid doesn't vary optim.lr, which is 0.003 in its trials."
    ]


def test_a_value_that_varies_with_the_point_picks_the_baseline(folder):
    """As a reference between keys makes it: the rate follows the heads, which the others differ in."""
    rows = [({"model.heads": heads}, float(heads), at(heads / 1000)) for heads in (1, 2, 4)]
    differences, said = configured(folder, rows, {RATE: 0.002})
    assert differences == [None, 0.0, None]
    assert said == [
        "No difference for heads=1, nor for 1 more: no point of the grid is optim.lr=0.002 and else the same."
    ]


def test_an_option_that_a_point_leaves_to_its_default_is_one(folder):
    rows = [
        ({"model.gate": {"name": "none"}}, 2.0, {"model": {"gate": {"name": "none"}}}),
        ({"model.gate": {"name": "a", "rank": 4}}, 1.5, {"model": {"gate": {"name": "a", "rank": 4}}}),
        ({"model.gate": {"name": "a"}}, 1.0, {"model": {"gate": {"name": "a", "rank": 16}}}),
    ]
    differences, _ = configured(folder, rows, {"model.gate": {"name": "a", "rank": 16}})
    assert differences == [1.0, 0.5, 0.0]
    (effect,) = find(load(folder.path)).effects
    assert effect.reference == 2


def test_a_baseline_with_options_is_one_point(folder):
    rows = [({"model.gate": {"name": "a", "rank": rank}}, float(rank), None) for rank in (16, 4)]
    differences, _ = configured(folder, rows, {"model.gate": {"name": "a", "rank": 4}})
    assert differences == [12.0, 0.0]
    (effect,) = find(load(folder.path)).effects
    assert effect.reference == 1


@pytest.mark.parametrize("damage", ["", "optim: [", "\x00", "- a"])
def test_a_damaged_config_is_an_unknown_one(folder, damage):
    rows = [({GATE: "a"}, 1.0, at(1e-3)), ({GATE: "none"}, 2.0, at(1e-3))]
    configured(folder, rows, {GATE: "none", RATE: 1e-3})
    (folder.path / "trial0-seed0/config.yaml").write_text(damage)
    experiment = load(folder.path)
    assert [p.delta for p in with_baselines(points(experiment), experiment.settings)] == [-1.0, 0.0]


def test_before_anything_has_started_nothing_is_said_of_it(folder):
    rows = [({GATE: gate}, None, None) for gate in ("a", "none")]
    assert configured(folder, rows, {GATE: "none", RATE: 1e-3}) == ([None, None], [])


def test_of_several_baselines_none_is_taken_and_that_is_said(folder):
    gates = [{"name": "none"}, {"name": "c"}, {"name": "a", "rank": 16}, {"name": "a", "rank": 4}]
    differences, said = configured(folder, [({"model.gate": gate}, 1.0, None) for gate in gates], {GATE: "a"})
    assert differences == [None, None, 0.0, 0.0]
    assert said == [
        "No difference for none, nor for 1 more: model.gate.name=a is any of a rank=16, a rank=4, "
        "and report.baseline doesn't say which."
    ]
