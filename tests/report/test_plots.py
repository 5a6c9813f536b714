"""Figures: what is drawn, in which colour, and that names never overlap."""

import io
import itertools
import math

import matplotlib.image
import numpy as np
import pytest

from gla_ablate.report import plots
from gla_ablate.report.labels import Labels, identity
from gla_ablate.report.points import points, ranked
from gla_ablate.report.trials import load


def drawn(folder, report=None):
    experiment = load(folder.save(report))
    grid = points(experiment)
    return grid, Labels(experiment.factors, [p.values for p in grid]), experiment.settings


def pixels(image):
    return matplotlib.image.imread(io.BytesIO(image), format="png")[..., :3]


def shows(image, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(pixels(image) - wanted).max(axis=-1) < 0.01).any())


@pytest.mark.parametrize("count", [1, 2, 9, 10, 30])
def test_every_size_of_grid_is_drawn_with_its_best_points_in_colour(folder, count):
    for a in range(count):
        for seed in (0, 1):
            folder.add(
                {"a": a}, seed, {"train/loss": [5.0, 3.0 + a, 2.0 + a], "val/loss": [3.0 + a, 2.0 + a + seed / 9]}
            )
    grid, labels, settings = drawn(folder)
    colours = plots.colours_of(grid, settings)
    coloured = [key for key, colour in colours.items() if colour != plots.GREY]
    assert len({colours[key] for key in coloured}) == len(coloured) == (count if count <= 9 else 6)
    assert coloured[:6] == [identity(p.values) for p in ranked(grid, settings)[:6]]
    image = plots.curves(grid, labels, settings)
    assert all(shows(image, colours[key]) for key in coloured)
    assert count <= 9 or shows(image, plots.GREY)
    assert (plots.metric_by_point(grid, labels, settings) is None) == (count == 1)


def test_a_large_grid_shows_the_baseline_of_its_best_point(folder):
    for a in range(12):
        folder.add({"a": a}, 0, {"val/loss": [1.0 + a]})
    grid, _, settings = drawn(folder, {"baseline": {"a": 11}})
    assert plots.colours_of(grid, settings)[identity({"a": 11})] != plots.GREY


def test_a_panel_for_training_validation_and_another_metric_the_metric_last(folder):
    curves = {"train/loss": [3.0, 2.0], "val/loss": [3.0, 2.0], "val/accuracy": [0.1, 0.2]}
    folder.add({"a": 1}, 0, curves)
    widths = {}
    for metric in ("val/loss", "val/accuracy"):
        grid, labels, settings = drawn(folder, {"metric": metric})
        assert settings.panels[-1] == metric
        widths[metric] = pixels(plots.curves(grid, labels, settings)).shape[1]
    assert widths["val/accuracy"] > 1.3 * widths["val/loss"]


def test_the_band_spans_the_seeds_and_the_line_is_their_mean(folder):
    for seed, values in enumerate(([3.0, 2.0, 1.0], [3.0, 4.0, 1.5], [3.0, 3.0, 1.7])):
        folder.add({"a": 1}, seed, {"val/loss": values})
    folder.add({"a": 1}, 3, {"val/loss": [99.0, 99.0]}, status="failed")
    line = plots.line_of(drawn(folder)[0][0], "val/loss")
    np.testing.assert_allclose(line.mean, [3.0, 3.0, 1.4])
    np.testing.assert_array_equal([line.step, line.low, line.high], [[10, 20, 30], [3, 2, 1], [3, 4, 1.7]])
    assert line.dashes == plots.SOLID


def test_a_point_without_a_finished_trial_shows_its_furthest_one_dashed_up_to_its_last_finite_value(folder):
    folder.add({"a": 1}, 0, {"val/loss": [3.0]}, status="running")
    folder.add({"a": 1}, 1, {"val/loss": [3.5, 2.5, math.nan]}, status="failed")
    line = plots.line_of(drawn(folder)[0][0], "val/loss")
    np.testing.assert_array_equal([line.step, line.mean], [[10, 20], [3.5, 2.5]])
    assert line.dashes == plots.DASHED


def test_a_long_curve_is_averaged_in_bins_that_keep_its_mean(folder):
    values = np.random.default_rng(0).uniform(1, 2, 1000)
    folder.add({"a": 1}, 0, {"val/loss": values.tolist()})
    line = plots.line_of(drawn(folder)[0][0], "val/loss")
    assert (len(line.mean), line.stride) == (200, 5)
    np.testing.assert_allclose(line.mean.mean(), values.mean())
    assert line.step[0] == 30  # the middle of steps 10 … 50


def test_nothing_logged_draws_nothing(folder):
    folder.add({"a": 1}, status="queued")
    folder.add({"a": 2}, curves={"val/loss": [math.nan]}, status="failed")
    grid, labels, settings = drawn(folder)
    assert plots.curves(grid, labels, settings) is None
    assert plots.metric_by_point(grid, labels, settings) is None


@pytest.mark.parametrize("wanted", [[], [0.5], [0.9, 0.1], [1.0] * 10, [0.0] * 10, [0.9, 0.52, 0.5, 0.48, 0.0, 0.0]])
def test_names_keep_their_distance_and_order_and_stay_beside_the_panel(wanted):
    heights = plots.spread(wanted, gap=0.06)
    assert all(above - below >= 0.06 - 1e-9 for above, below in itertools.pairwise(heights))
    assert all(-1e-9 <= height <= 1 for height in heights)


def test_names_that_have_room_stay_at_their_lines():
    assert plots.spread([0.9, 0.5, 0.1], gap=0.06) == pytest.approx([0.9, 0.5, 0.1])
