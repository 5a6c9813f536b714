"""Time left, against hand-made trials whose pace is known."""

import json
from dataclasses import replace

import pytest

from gla_ablate.config import Config, ModelConfig
from gla_ablate.experiment import Trial
from gla_ablate.launch.forecast import Forecast, Past, expected, makespan, past, rates, tokens
from gla_ablate.launch.state import State
from gla_ablate.model import flops_per_token

SMALL = Config(model=ModelConfig(dim=32, layers=1))
WIDE = replace(SMALL, model=replace(SMALL.model, dim=64))
TRIALS = [Trial("a", {}, 0, SMALL), Trial("b", {}, 1, SMALL), Trial("c", {}, 0, WIDE)]
FINISHED = State("finished", step=200, max_steps=200, seconds=25.0, setup=5.0, trained=20.0, first_step=1)


def half(**more):
    """Setup took 5 s, 100 steps took 10: the other 100 take 10 as well."""
    return State(
        **{"status": "running", "step": 101, "max_steps": 201, "seconds": 15.0, "setup": 5.0, "trained": 10.0}
        | {"first_step": 1}
        | more
    )


def test_work_is_what_training_computes():
    rate = rates(TRIALS)
    assert rate["a"] == rate["b"] == flops_per_token(SMALL.model, 256, 256) < rate["c"]
    assert tokens(TRIALS[0]) == 200 * 8 * 256
    recall = {"name": "mqar", "vocab_size": 64, "pairs": 4, "seq_len": 16, "batch_size": 8}
    few = rates([Trial("few", {}, 0, replace(SMALL, data=recall))])["few"]
    assert few == flops_per_token(SMALL.model, 64, 16, labelled_share=0.25)


@pytest.mark.parametrize(
    ("running", "queued", "slots", "seconds"),
    [
        ([], [], 2, 0.0),
        ([3.0], [], 2, 3.0),
        ([], [4.0, 4.0, 4.0], 2, 8.0),
        ([3.0, 1.0], [4.0], 2, 5.0),
        ([9.0, 1.0], [2.0, 2.0, 2.0], 2, 9.0),
        ([5.0, 5.0, 5.0], [1.0], 2, 6.0),
    ],
)
def test_a_grid_ends_when_its_last_slot_does(running, queued, slots, seconds):
    assert makespan(running, queued, slots) == seconds


def test_a_trial_goes_on_at_the_pace_of_its_own_last_attempt():
    forecast = Forecast(TRIALS, 1)
    assert forecast.of_trial(half()) == pytest.approx(10.0)
    resumed = half(seconds=1000.0, trained=5.0, first_step=51)  # 50 steps in 5 s, after an attempt of 985 s
    assert forecast.of_trial(resumed) == pytest.approx(10.0)
    assert forecast.of_trial(State("running", max_steps=200)) is None
    assert forecast.of_trial(half(step=1, trained=0.0)) is None and forecast.of_trial(FINISHED) is None


def test_the_others_take_what_their_operations_would_at_the_pace_so_far():
    assert Forecast(TRIALS, 1).of_grid(dict.fromkeys("abc", State(max_steps=200))) is None
    per_step = 20.0 / 199
    states = {"a": FINISHED, "b": State(max_steps=200), "c": State(max_steps=200)}
    forecast = Forecast(TRIALS, 1)
    ratio = forecast.work["c"] / forecast.work["a"]
    assert ratio > 1.5
    assert forecast.of_grid(states) == pytest.approx(2 * 5.0 + 200 * per_step * (1 + ratio))
    assert Forecast(TRIALS, 2).of_grid(states) == pytest.approx(5.0 + 200 * per_step * ratio)
    begun = states | {"b": State("running", max_steps=200, seconds=2.0)}  # no step yet: 2 s of it are over
    assert forecast.of_grid(begun) == pytest.approx(2 * 5.0 + 200 * per_step * (1 + ratio) - 2.0)
    assert forecast.of_grid(dict.fromkeys("abc", FINISHED)) == 0.0


def test_the_past_is_what_finished_on_such_a_device(tmp_path):
    good = {"flops_per_token": 1e6, "tokens": 1000, "steps": 10, "seconds": 12.0, "setup": 2.0, "device": "cpu"}
    damaged = [
        good | {"seconds": 10**400},
        good | {"seconds": float("inf")},
        good | {"device": "another"},
        good | {"tokens": 0},
        {**good, "seconds": "long"},
        {"device": "cpu"},
        [],
    ]
    for i, result in enumerate([good, *damaged]):
        (tmp_path / "grid" / str(i)).mkdir(parents=True)
        (tmp_path / "grid" / str(i) / "result.json").write_text(json.dumps(result))
    assert past(tmp_path, "cpu") == [Past(1e8, 2.0, 1e-8)]
    assert past(tmp_path / "nothing", "cpu") == []


def test_an_estimate_follows_the_trials_whose_steps_are_nearest_in_size():
    small, large = [Past(1e6, 2.0, 1e-8)] * 5, [Past(1e9, 4.0, 1e-9)] * 5
    assert expected(2e6, 500, small + large) == pytest.approx(2.0 + 500 * 2e6 * 1e-8)
    assert expected(2e9, 500, small + large) == pytest.approx(4.0 + 500 * 2e9 * 1e-9)
    assert expected(1e7, 500, small + large) is None  # ten times one, a hundredth of the other
