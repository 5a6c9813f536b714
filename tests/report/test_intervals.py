"""Intervals over seeds: what they say, and what they can't."""

from __future__ import annotations

import math

import pytest

from gla_ablate.report.intervals import Interval, interval, reach, verdict
from gla_ablate.report.points import paired, points
from gla_ablate.report.trials import load


def test_the_interval_is_students():
    # a textbook's: mean 2, s = 1, n = 3, t(0.975, 2) = 4.3027
    found = interval([1.0, 2.0, 3.0])
    assert found is not None and found.low is not None and found.high is not None
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.302652729 / math.sqrt(3)) == 2 - found.low
    assert found.tie is True
    assert interval([2.0, 2.1, 1.9]).tie is False  # type: ignore[union-attr]


def test_one_seed_gives_no_interval_and_none_no_difference():
    assert interval([0.5]) == Interval(0.5, None, None, 1) and interval([0.5]).tie is None  # type: ignore[union-attr]
    assert interval([]) is None


def test_seeds_that_say_the_same_are_a_tie_at_zero_alone():
    assert interval([0.0, 0.0]).tie is True and interval([0.1, 0.1]).tie is False  # type: ignore[union-attr]


def test_an_interval_turned_round_is_that_of_the_negatives():
    assert -Interval(0.5, -0.25, 1.25, 3) == Interval(-0.5, -1.25, 0.25, 3)
    assert -Interval(0.5, 0.0, 1.0, 2) == Interval(-0.5, -1.0, 0.0, 2)
    assert -Interval(0.5, None, None, 1) == Interval(-0.5, None, None, 1)


@pytest.mark.parametrize(("n", "stds"), [(2, 8.985), (3, 2.484), (5, 1.242), (10, 0.715)])  # t(0.975, n − 1) / √n
def test_few_seeds_make_wide_intervals(n, stds):
    assert reach(n) == pytest.approx(stds, abs=5e-4)


@pytest.mark.parametrize(
    ("difference", "in_min", "in_max"),
    [
        (Interval(-0.5, -0.75, -0.25, 2), "better", "worse"),
        (Interval(0.5, 0.25, 0.75, 2), "worse", "better"),
        (Interval(0.5, -0.25, 1.25, 2), "tie", "tie"),
        (Interval(0.5, 0.0, 1.0, 2), "tie", "tie"),
        (Interval(0.5, None, None, 1), "one seed", "one seed"),
        (None, "no common seed", "no common seed"),
    ],
)
def test_the_verdict_follows_the_interval_and_the_good_end_of_the_metric(difference, in_min, in_max):
    assert (verdict(difference, "min"), verdict(difference, "max")) == (in_min, in_max)


def test_points_are_compared_seed_by_seed(folder):
    folder.fill([({"gate": "a"}, {0: 1.0, 1: 3.0, 2: 5.0}), ({"gate": "b"}, {1: 3.2, 2: 5.1, 3: 0.0})])
    a, b = points(load(folder.save()))
    found = paired(a, b)
    assert found is not None and found.n == 2 and found.mean == pytest.approx(0.15)
    assert paired(b, a) == -found


def test_points_without_a_common_seed_have_no_difference(folder):
    folder.fill([({"gate": "a"}, {0: 1.0}), ({"gate": "b"}, {1: 3.2, 0: None})])
    a, b = points(load(folder.save()))
    assert paired(a, b) is None
