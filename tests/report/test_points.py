"""Means, stds and differences over grid points."""

import math
import statistics

import pytest

from gla_ablate.report.baselines import with_baselines
from gla_ablate.report.points import points, ranked
from gla_ablate.report.trials import load

DATA_DEPENDENT, FIXED, NONE = {"name": "data_dependent", "rank": 16}, {"name": "fixed_decay"}, {"name": "none"}


def grid_of(folder, report=None):
    experiment = load(folder.save(report))
    return with_baselines(points(experiment), experiment.settings)


def test_mean_and_sample_std_are_over_the_seeds_of_a_point(folder):
    for seed, value in enumerate([2.0, 2.3, 2.9]):
        folder.add({"model.heads": 2}, seed, {"val/loss": [value]})
    folder.add({"model.heads": 4}, 0, {"val/loss": [7.0]})
    first, second = grid_of(folder)
    assert first.mean == pytest.approx(2.4, abs=1e-15)
    assert first.std == pytest.approx(statistics.stdev([2.0, 2.3, 2.9]), abs=1e-15)
    assert (first.n, second.n, second.mean, second.std) == (3, 1, 7.0, None)


def test_trials_that_do_not_count_are_left_out_and_n_says_so(folder):
    folder.add({"a": 1}, 0, {"val/loss": [2.0]})
    folder.add({"a": 1}, 1, {"val/loss": [9.0]}, status="failed", reason="out of memory")
    folder.add({"a": 1}, 2, {"val/loss": [math.nan]})
    folder.add({"a": 1}, 3, {"val/loss": [9.0]}, status="running")
    folder.add({"a": 1}, 4, status=None)
    (point,) = grid_of(folder)
    assert (point.mean, point.std, point.n, len(point.trials)) == (2.0, None, 1, 5)
    assert point.state() == "1 failed, 1 no value, 1 running, 1 not started"


def test_a_point_is_the_same_whatever_the_order_of_a_mappings_keys(folder):
    folder.add({"model.gate": {"name": "g", "rank": 4}}, 0, {"val/loss": [1.0]})
    folder.add({"model.gate": {"rank": 4, "name": "g"}}, 1, {"val/loss": [3.0]})
    (point,) = grid_of(folder)
    assert (point.mean, point.n) == (2.0, 2)


@pytest.mark.parametrize("factor", ["model.gate", "model.gate.name"])
def test_the_baseline_matches_a_mapping_by_dotted_access_and_differs_in_its_keys_alone(folder, factor):
    loss = {("data_dependent", 2): 2.0, ("none", 2): 2.25, ("data_dependent", 4): 1.5, ("none", 4): 1.75}
    for (gate, heads), value in loss.items():
        mapping = DATA_DEPENDENT if gate == "data_dependent" else NONE
        folder.add({factor: gate if factor.endswith("name") else mapping, "h": heads}, 0, {"val/loss": [value]})
    grid = grid_of(folder, {"baseline": {"model.gate.name": "none"}})
    assert [point.delta for point in grid] == [-0.25, 0.0, -0.25, 0.0]
    assert [point.is_baseline for point in grid] == [False, True, False, True]


def test_a_point_whose_baseline_is_excluded_or_failed_has_no_delta(folder):
    folder.add({"gate": "on", "h": 2}, 0, {"val/loss": [2.0]})
    folder.add({"gate": "on", "h": 4}, 0, {"val/loss": [2.0]})
    folder.add({"gate": "off", "h": 4}, 0, {"val/loss": [2.0]}, status="failed")
    assert [point.delta for point in grid_of(folder, {"baseline": {"gate": "off"}})] == [None, None, None]


def test_a_baseline_of_two_keys_frees_both(folder):
    folder.add({"g": "on", "h": 2, "c": 32}, 0, {"val/loss": [2.0]})
    folder.add({"g": "off", "h": 4, "c": 32}, 0, {"val/loss": [3.0]})
    folder.add({"g": "off", "h": 4, "c": 64}, 0, {"val/loss": [5.0]})
    grid = grid_of(folder, {"baseline": {"g": "off", "h": 4}})
    assert [point.delta for point in grid] == [-1.0, 0.0, 0.0]


def test_a_baseline_option_does_not_free_the_name(folder):
    for gate in (DATA_DEPENDENT, {"name": "data_dependent", "rank": 4}, FIXED):
        folder.add({"model.gate": gate}, 0, {"val/loss": [2.0]})
    grid = grid_of(folder, {"baseline": {"model.gate.rank": 16}})
    assert [point.delta for point in grid] == [0.0, 0.0, None]


def test_of_several_baselines_none_is_chosen(folder):
    for gate in (DATA_DEPENDENT, {"name": "data_dependent", "rank": 4}, NONE):
        folder.add({"model.gate": gate}, 0, {"val/loss": [2.0]})
    grid = grid_of(folder, {"baseline": {"model.gate.name": "data_dependent"}})
    assert [point.delta for point in grid] == [0.0, 0.0, None]


def test_costs_come_from_the_results_of_trials_that_count(folder):
    folder.add({"a": 1}, 0, {"val/loss": [2.0]}, result={"tokens_per_s": 10.0, "peak_mem_mb": 5.0, "backend": "torch"})
    folder.add({"a": 1}, 1, {"val/loss": [2.0]}, result={"tokens_per_s": 30.0, "peak_mem_mb": 7.0, "backend": "triton"})
    folder.add({"a": 2}, 0, {"val/loss": [2.0]}, status="failed")
    first, failed = grid_of(folder)
    assert (first.tokens_per_s, first.peak_mem_mb, first.backend) == (20.0, 7.0, "torch, triton")
    assert (first.params, first.state_size, first.flops_per_token) == (1_234_567, 16_384, 7.4e6)
    assert failed.params is failed.tokens_per_s is failed.backend is None


@pytest.mark.parametrize(("mode", "order"), [("min", [3, 2, 1, 4]), ("max", [1, 2, 3, 4])])
def test_ranking_puts_the_best_first_and_points_without_a_mean_last(folder, mode, order):
    for a, value in ((4, math.nan), (1, 3.0), (2, 2.0), (3, 1.0)):
        folder.add({"a": a}, 0, {"val/loss": [value]})
    experiment = load(folder.save({"mode": mode}))
    assert [point.values["a"] for point in ranked(points(experiment), experiment.settings)] == order
