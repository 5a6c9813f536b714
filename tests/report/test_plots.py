"""Figures: what is drawn, in which colour, and that names never overlap."""

import itertools
import json
import math

import numpy as np
import pytest

from gla_ablate.report import plots
from gla_ablate.report.findings import find
from gla_ablate.report.labels import identity
from gla_ablate.report.plots import metric as metric_plot
from gla_ablate.report.plots.cost import tick_text
from gla_ablate.report.plots.curves import DASHED, SOLID, line_of
from gla_ablate.report.plots.factors import block
from gla_ablate.report.plots.heatmap import crossed, means, side
from gla_ablate.report.plots.style import GREY, colours_of, in_order, shown_range, spread
from gla_ablate.report.trials import load
from tests.pictures import pixels, shows


def drawn(folder, report=None):
    return find(load(folder.save(report)))


@pytest.mark.parametrize("count", [1, 2, 9, 10, 30])
def test_every_size_of_grid_is_drawn_with_its_best_points_in_colour(folder, count):
    for a in range(count):
        for seed in (0, 1):
            folder.add(
                {"a": a}, seed, {"train/loss": [5.0, 3.0 + a, 2.0 + a], "val/loss": [3.0 + a, 2.0 + a + seed / 9]}
            )
    found = drawn(folder)
    colours = colours_of(found.shown, found.experiment.settings)
    coloured = [key for key, colour in colours.items() if colour != GREY]
    assert len({colours[key] for key in coloured}) == len(coloured) == (count if count <= 9 else 6)
    assert coloured[:6] == [identity(p.values) for p in found.ranked[:6]]
    image = plots.curves(found)
    assert all(shows(image, colours[key]) for key in coloured)
    assert count <= 9 or shows(image, GREY)
    assert (plots.metric_by_point(found) is None) == (count == 1)


def test_no_seed_of_a_point_lies_outside_the_axis(folder, monkeypatch):
    for seed, last in enumerate([2.0, 2.0, 2.0, 2.0, 1.0]):  # 1.8 sample stds below the mean
        folder.add({"a": 0}, seed, {"val/loss": [last]})
        folder.add({"a": 1}, seed, {"val/loss": [last + 0.1]})
    monkeypatch.setattr(metric_plot, "png", lambda figure: figure)
    low, high = metric_plot.metric_by_point(drawn(folder)).axes[0].get_xlim()
    assert low < 1.0 and high > 2.1


def test_a_large_grid_shows_the_baseline_of_its_best_point(folder):
    for a in range(12):
        folder.add({"a": a}, 0, {"val/loss": [1.0 + a]})
    found = drawn(folder, {"baseline": {"a": 11}})
    assert colours_of(found.shown, found.experiment.settings)[identity({"a": 11})] != GREY


def test_a_panel_for_training_validation_and_another_metric_the_metric_last(folder):
    curves = {"train/loss": [3.0, 2.0], "val/loss": [3.0, 2.0], "val/accuracy": [0.1, 0.2]}
    folder.add({"a": 1}, 0, curves)
    widths = {}
    for metric in ("val/loss", "val/accuracy"):
        found = drawn(folder, {"metric": metric})
        assert found.experiment.settings.panels[-1] == metric
        widths[metric] = pixels(plots.curves(found)).shape[1]
    assert widths["val/accuracy"] > 1.3 * widths["val/loss"]


def test_the_band_spans_the_seeds_and_the_line_is_their_mean(folder):
    for seed, values in enumerate(([3.0, 2.0, 1.0], [3.0, 4.0, 1.5], [3.0, 3.0, 1.7])):
        folder.add({"a": 1}, seed, {"val/loss": values})
    folder.add({"a": 1}, 3, {"val/loss": [99.0, 99.0]}, status="failed")
    line = line_of(drawn(folder).shown[0], "val/loss")
    np.testing.assert_allclose(line.mean, [3.0, 3.0, 1.4])
    np.testing.assert_array_equal([line.step, line.low, line.high], [[10, 20, 30], [3, 2, 1], [3, 4, 1.7]])
    assert line.dashes == SOLID


def test_a_point_without_a_finished_trial_shows_its_furthest_one_dashed_up_to_its_last_finite_value(folder):
    folder.add({"a": 1}, 0, {"val/loss": [3.0]}, status="running")
    folder.add({"a": 1}, 1, {"val/loss": [3.5, 2.5, math.nan]}, status="failed")
    line = line_of(drawn(folder).shown[0], "val/loss")
    np.testing.assert_array_equal([line.step, line.mean], [[10, 20], [3.5, 2.5]])
    assert line.dashes == DASHED


def test_a_long_curve_is_averaged_in_bins_that_keep_its_mean(folder):
    values = np.random.default_rng(0).uniform(1, 2, 1000)
    folder.add({"a": 1}, 0, {"val/loss": values.tolist()})
    line = line_of(drawn(folder).shown[0], "val/loss")
    assert (len(line.mean), line.stride) == (200, 5)
    np.testing.assert_allclose(line.mean.mean(), values.mean())
    assert line.step[0] == 30  # the middle of steps 10 … 50


def test_nothing_logged_draws_nothing(folder):
    folder.add({"a": 1}, status="queued")
    folder.add({"a": 2}, curves={"val/loss": [math.nan]}, status="failed")
    found = drawn(folder)
    assert plots.curves(found) is None
    assert plots.metric_by_point(found) is None


@pytest.mark.parametrize("wanted", [[], [0.5], [0.9, 0.1], [1.0] * 10, [0.0] * 10, [0.9, 0.52, 0.5, 0.48, 0.0, 0.0]])
def test_names_keep_their_distance_and_order_and_stay_beside_the_panel(wanted):
    heights = spread(wanted, gap=0.06)
    assert all(above - below >= 0.06 - 1e-9 for above, below in itertools.pairwise(heights))
    assert all(-1e-9 <= height <= 1 for height in heights)


def test_names_that_have_room_stay_at_their_lines():
    assert spread([0.9, 0.5, 0.1], gap=0.06) == pytest.approx([0.9, 0.5, 0.1])


def cells_of(found):
    down, across = (side(effect, found.experiment.settings) for effect in found.effects[:2])
    return means(found.shown, found.labels, down, across)


NEW = (plots.factor_effects, plots.heat_map, plots.cost)
GATE = [{"name": "data_dependent", "rank": 16}, {"name": "fixed_decay"}, {"name": "none"}]
SIZES = [{"state_size": 4096 * n, "params": 1000 * n, "tokens_per_s": 100.0 / n} for n in (1, 2, 4)]


def two_factors(folder, seeds=(0, 1), skip=()):
    """Three gates, which move the metric by 1, and three numbers of heads out of order, which move it by 0.1."""
    for i, gate in enumerate(GATE):
        for j, heads in enumerate((16, 2, 4)):
            for seed in seeds:
                if (i, j) not in skip:
                    value = 2.0 + i + j / 10 + seed / 100
                    folder.add({"model.gate": gate, "model.heads": heads}, seed, {"val/loss": [value]}, result=SIZES[j])
    return folder


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("plot", NEW)
def test_every_figure_of_two_factors_is_an_image_with_something_in_it(folder, plot, mode, seeds):
    found = drawn(two_factors(folder, seeds), {"mode": mode})
    image = pixels(plot(found))
    assert min(image.shape[:2]) > 100 and (image < 0.5).any()


@pytest.mark.parametrize("plot", [*NEW, plots.metric_by_point])
def test_a_figure_that_would_say_nothing_is_none(folder, new_folder, plot):
    one = new_folder("one")
    one.add({"a": 1}, 0, {"val/loss": [1.0]})
    unfinished = new_folder("unfinished")
    for a in (1, 2):
        for b in (1, 2):
            unfinished.add({"a": a, "b": b}, 0, {"val/loss": [math.nan]}, status="finished" if a == 1 else "running")
    for case in (one, unfinished):
        assert plot(drawn(case)) is None


def test_one_factor_has_effects_but_no_heat_map_and_equal_costs_no_panel(folder):
    for a in (1, 2):
        folder.add({"a": a}, 0, {"val/loss": [float(a)]})
    found = drawn(folder)
    assert plots.factor_effects(found) is not None
    assert plots.heat_map(found) is None
    assert plots.cost(found) is None


@pytest.mark.parametrize("missing", ["state_size", "params", "tokens_per_s"])
def test_a_cost_without_values_has_no_panel(folder, missing):
    for n, size in enumerate(SIZES):
        folder.add({"a": n}, 0, {"val/loss": [1.0 + n]}, result=size)
    whole = pixels(plots.cost(drawn(folder))).shape[1]
    for i in range(len(SIZES)):
        result = folder.path / f"trial{i}-seed0/result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {missing: None}))
    assert pixels(plots.cost(drawn(folder))).shape[1] < 0.85 * whole


def test_a_point_has_its_colour_in_every_figure_of_points(folder):
    found = drawn(two_factors(folder))
    colours = colours_of(found.shown, found.experiment.settings)
    for plot in (plots.curves, plots.metric_by_point, plots.cost):
        image = plot(found)
        assert all(shows(image, colour) for colour in colours.values()), plot


def test_effects_are_in_numeric_order_with_their_reference(folder):
    found = drawn(two_factors(folder))
    gate, heads = (block(effect, found.labels) for effect in found.effects)
    assert [row.text for row in gate] == ["gate", "data_dependent", "fixed_decay", "none"]
    assert [(row.text, row.kind) for row in heads[1:]] == [("2", "level"), ("4", "level"), ("16", "reference")]
    assert heads[1].effect.mean == pytest.approx(0.1)


def test_a_level_that_is_never_beside_the_reference_keeps_its_name(folder):
    folder.add({"a": 1, "b": 1}, 0, {"val/loss": [1.0]})
    folder.add({"a": 2, "b": 1}, 0, {"val/loss": [2.0]})
    folder.add({"a": 3, "b": 2}, 0, {"val/loss": [3.0]})
    folder.add({"a": 3, "b": 3}, 0, {"val/loss": [3.0]})
    found = drawn(folder)
    a, b = (block(effect, found.labels) for effect in found.effects)
    assert [(row.text, row.kind) for row in a[1:]] == [("1", "reference"), ("2", "level"), ("3", "unknown")]
    assert b == []  # no level of b has an effect
    assert plots.factor_effects(found) is not None


def test_the_map_is_of_two_factors_that_lose_no_level(folder):
    """Tasks and mixers differ most, but mixers have too little in common over all gates."""
    for task in (1, 2):
        for mixer, gates in (("gla", "abc"), ("softmax", "a")):
            for i, gate in enumerate(gates):
                loss = 20.0 * task + i / 4 + 9.0 * (mixer == "softmax")
                folder.add({"task": task, "model.mixer": mixer, "model.gate": {"name": gate}}, 0, {"val/loss": [loss]})
    found = drawn(folder)
    assert [effect.factors for effect in found.effects] == [("task",), ("model.mixer",), ("model.gate",)]
    down, across, cells, over = crossed(found)
    assert (down.factors, across.factors) == (("task",), ("model.gate",))
    assert cells.tolist() == [[20.0, 20.25, 20.5], [40.0, 40.25, 40.5]]
    assert over == "over 1 of 2 settings, which all cells have"


def test_a_cell_is_the_mean_over_what_all_cells_have(folder):
    """A third factor moves the metric by 100 and is missing in one cell, which mustn't look better for it."""
    for a in (1, 2):
        for b in (1, 2):
            for c in (0, 1) if (a, b) != (2, 2) else (0,):
                folder.add({"a": a, "b": b, "c": c}, 0, {"val/loss": [a + b / 10 + 100.0 * c]})
    found = drawn(folder)
    cells, over = cells_of(found)
    np.testing.assert_allclose(cells, [[1.1, 1.2], [2.1, 2.2]])
    assert over == "over 1 of 2 settings, which all cells have"


def test_every_cell_is_over_the_same_seeds(folder):
    """A seed moves the metric by 100 and is missing in one cell, which mustn't look better for it."""
    for a, b, seed in itertools.product((1, 2), (1, 2), (0, 1)):
        curves = {"val/loss": [a + b / 10 + 100.0 * seed]}
        folder.add({"a": a, "b": b}, seed, curves, status="failed" if (a, b, seed) == (2, 2, 1) else "finished")
    cells, over = cells_of(drawn(folder))
    np.testing.assert_allclose(cells, [[1.1, 1.2], [2.1, 2.2]])
    assert over == "over 1 of 2 seeds, which all cells have"


def test_a_cell_with_too_little_in_common_with_the_rest_has_no_mean(folder):
    for a, b, c in itertools.product((1, 2), (1, 2), range(5)):
        if (a, b) != (2, 2) or c == 0:
            folder.add({"a": a, "b": b, "c": c}, 0, {"val/loss": [a + b / 10 + 100.0 * c]})
    cells, over = cells_of(drawn(folder))
    np.testing.assert_allclose(cells, [[201.1, 201.2], [202.1, np.nan]])
    assert over == ""


def test_a_cell_without_a_value_is_hatched(folder, new_folder):
    def grey(case):
        return int((np.abs(pixels(plots.heat_map(drawn(case))) - 0x9A / 255).max(axis=-1) < 0.01).sum())

    whole, holed = two_factors(new_folder("whole")), two_factors(folder, skip={(1, 1)})
    assert grey(holed) > 5 * grey(whole)  # some of a letter's edge is grey too


def test_the_best_cell_is_the_darkest_whichever_end_is_good(folder):
    for mode in ("min", "max"):
        found = drawn(two_factors(folder) if mode == "min" else folder, {"mode": mode})
        image = pixels(plots.heat_map(found))
        assert shows(plots.heat_map(found), "#00224E")  # cividis's dark end
        dark = np.argwhere(np.abs(image - np.array([0, 0x22, 0x4E]) / 255).max(axis=-1) < 0.01)
        assert (dark[:, 0].mean() < image.shape[0] / 2) == (mode == "min")  # gates go down, worse by 1 each


def test_one_far_worse_value_leaves_the_range_to_the_others(folder):
    settings = drawn(two_factors(folder)).experiment.settings
    assert shown_range([2.0, 2.1, 2.2, 90.0], settings) == (2.0, 2.2)
    assert shown_range([2.0, 2.1, 2.2], settings) == (2.0, 2.2)
    assert shown_range([1.0], settings) == (1.0, 1.0)


def test_nothing_is_hidden_for_a_difference_that_is_none(folder):
    """Of tasks that are solved and one that isn't, that one is what there is to see."""
    settings = drawn(two_factors(folder), {"mode": "max"}).experiment.settings
    assert shown_range([1.0, 0.9999, 0.6], settings) == (0.6, 1.0)
    assert shown_range([1.0, 0.99, 0.6], settings) == (0.99, 1.0)


def test_numbers_are_shown_by_size_and_anything_else_as_the_grid_has_it():
    assert in_order([16, 2, 4.5]) == [1, 2, 0]
    assert in_order(["b", "a"]) == in_order([True, 0]) == in_order([None, 1]) == [0, 1]


@pytest.mark.parametrize(("size", "text"), [(4096, "4,096"), (1.5e6, "1.5M"), (468_000, "468k"), (0.25, "0.25")])
def test_ticks_are_short(size, text):
    assert tick_text(size) == text


def test_a_large_grid_is_drawn_in_bounded_figures(folder):
    for a in range(300):
        for b in (0, 1):
            folder.add({"a": a, "b": b}, 0, {"val/loss": [1.0 + a / 100 + b]}, result={"params": 1000 * a + b})
    case = drawn(folder)
    for plot in (*NEW, plots.metric_by_point, plots.curves):
        assert max(pixels(plot(case)).shape) < 4000, plot
