"""Reading trial folders: states, the picked value, files that are missing or half written."""

import math

import pytest

from gla_ablate.errors import ConfigError
from gla_ablate.report.trials import load

CURVES = {"val/loss": [3.0, 2.0, 2.5], "val/accuracy": [0.1, 0.9, 0.5], "train/loss": [3.1]}


@pytest.mark.parametrize(
    ("report", "value", "step"),
    [
        ({}, 2.5, 30),
        ({"pick": "best"}, 2.0, 20),
        ({"metric": "val/accuracy", "mode": "max", "pick": "best"}, 0.9, 20),
        ({"metric": "val/accuracy", "mode": "max"}, 0.5, 30),
        ({"metric": "val/accuracy", "mode": "min", "pick": "best"}, 0.1, 10),
        ({"metric": "train/loss"}, 3.1, 10),
    ],
)
def test_pick_takes_the_last_or_the_best_value_of_any_logged_tag(folder, report, value, step):
    folder.add({"a": 1}, curves=CURVES)
    (trial,) = load(folder.save(report)).trials
    assert (trial.value, trial.step, trial.counts) == (value, step, True)


def test_values_are_read_in_full_precision_and_in_the_order_of_steps(folder):
    exact = 2.0000000000000004
    folder.add({"a": 1}, curves={"val/loss": {30: exact, 10: 9.0, 20: 8.0}})
    assert load(folder.save()).trials[0].value == exact


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_finished_trial_whose_metric_is_not_finite_does_not_count_and_says_why(folder, bad):
    folder.add({"a": 1}, curves={"val/loss": [2.0, bad]})
    (trial,) = load(folder.save()).trials
    assert not trial.counts
    assert trial.reason == f"val/loss is {bad} at step 20"


def test_best_looks_past_values_that_are_not_finite(folder):
    folder.add({"a": 1}, curves={"val/loss": [math.nan, 2.0, -math.inf]})
    folder.add({"a": 2}, curves={"val/loss": [math.nan]})
    good, never = load(folder.save({"pick": "best"})).trials
    assert (good.value, good.step) == (2.0, 20)
    assert never.reason == "val/loss was never finite"


def test_a_finished_trial_without_the_metric_does_not_count_and_says_so(folder):
    folder.add({"a": 1}, curves={"train/loss": [2.0]})
    (trial,) = load(folder.save()).trials
    assert not trial.counts and trial.reason == "logged no val/loss"


@pytest.mark.parametrize(
    ("status", "reason", "told"),
    [
        ("failed", "out of memory", "out of memory"),
        ("failed", None, "at step 30 of 40, no reason given"),
        ("interrupted", None, "at step 30 of 40"),
        ("running", None, "at step 30 of 40"),
        ("queued", None, "waits for its turn"),
    ],
)
def test_a_trial_that_is_not_finished_never_counts_and_has_its_reason(folder, status, reason, told):
    folder.add({"a": 1}, curves=CURVES, status=status, reason=reason)
    (trial,) = load(folder.save()).trials
    assert (trial.status, trial.reason, trial.counts) == (status, told, False)


def test_a_trial_without_a_folder_has_not_started(folder):
    folder.add({"a": 1}, status=None)
    (trial,) = load(folder.save()).trials
    assert (trial.status, trial.counts) == ("not started", False)


def test_a_trial_that_lacks_its_result_is_not_finished(folder):
    (folder.add({"a": 1}, curves=CURVES) / "result.json").unlink()
    assert load(folder.save()).trials[0].status == "interrupted"


def test_a_half_written_last_line_is_left_out(folder):
    trial = folder.add({"a": 1}, curves=CURVES, status="running")
    with (trial / "metrics.csv").open("a") as file:
        file.write("40,val/loss,1.2")  # the rest of the number isn't there yet
    assert load(folder.save()).trials[0].value == 2.5


def test_a_metric_that_nobody_logged_is_answered_with_the_nearest_tag(folder):
    folder.add({"a": 1}, curves=CURVES)
    hint = load(folder.save({"metric": "val/los"})).hint()
    assert "No trial logged 'val/los', did you mean 'val/loss'?" in hint and "val/accuracy" in hint


def test_a_folder_without_an_experiment_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"no experiment\.json"):
        load(tmp_path / "nowhere")
