"""The figure of memory lengths: whose gates it shows, and what it makes of seeds and layers without a gate."""

import itertools
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from gla_ablate.report import plots, write_report
from gla_ablate.report.findings import find
from gla_ablate.report.plots.memory import by_layer_and_head, round_numbers, titled
from gla_ablate.report.plots.style import STYLE, png
from gla_ablate.report.trials import load

GATE = "model.gate.name"


def logged(memory: dict[tuple[int, int], float]) -> dict[str, list[float]]:
    return {"val/loss": [3.0, 2.0]} | {
        f"gate/layer{layer}/head{head}/memory": [1.0, tokens] for (layer, head), tokens in memory.items()
    }


def test_memory_is_that_of_the_last_step_and_the_geometric_mean_over_seeds(folder):
    folder.add({GATE: "a"}, 0, curves=logged({(0, 0): 10.0, (0, 1): 5.0, (2, 0): 8.0, (2, 1): 0.0}))
    folder.add(
        {GATE: "a"}, 1, curves=logged({(0, 0): 1000.0, (0, 1): 5.0, (2, 0): 2.0, (2, 1): 1.0})
    )  # 0: it lets nothing through
    folder.add({GATE: "b"}, 0, curves={"val/loss": [3.0, 2.5]})
    path = folder.save({})
    found = find(load(path))
    first, second = found.ranked
    cells = by_layer_and_head(first)
    np.testing.assert_allclose(cells, [[100, 5], [math.nan, math.nan], [4, 0.1]])
    assert by_layer_and_head(second) is None
    write_report(path)
    assert (path / "report/memory.png").is_file() and "memory.png" in (path / "report/report.md").read_text()


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("span", [1.0, 1.05, 1.5, 3.0, 9.0, 11.0, 70.0, 1e3, 1e8])
@pytest.mark.parametrize("low", [0.01, 0.7, 28.0])
def test_the_colour_bar_is_marked_in_plain_numbers_that_keep_their_distance(folder, monkeypatch, low, span, layers):
    lengths = np.geomspace(low, low * span, 2 * layers)
    places = list(itertools.product(range(layers), range(2)))
    folder.add({GATE: "a"}, 0, curves=logged(dict(zip(places, lengths.tolist(), strict=True))))
    figures = []
    monkeypatch.setattr("gla_ablate.report.plots.memory.png", lambda figure: figures.append(figure) or png(figure))
    plots.memory_lengths(find(load(folder.save({}))))
    (figure,) = figures
    assert not any("$" in text.get_text() for text in figure.findobj(Text))
    axis = figure.axes[-1].yaxis
    with matplotlib.rc_context(STYLE):
        figure.canvas.draw()
        boxes = [tick.label2.get_window_extent() for tick in axis.get_major_ticks()]
    assert len(boxes) >= 2 and all(below.y1 < above.y0 for below, above in itertools.pairwise(boxes))
    assert all(axis.axes.transData.transform((0, mark))[1] >= 0 for mark in axis.get_majorticklocs())


@pytest.mark.parametrize(
    ("low", "high", "apart", "marks"),
    [
        (1, 100, 0.15, [1, 2, 5, 10, 20, 50, 100]),
        (1, 100, 0.2, [1, 3, 10, 30, 100]),
        (1, 100, 0.3, [1, 10, 100]),
        (9, 95, 0.1, [10, 20, 50]),
        (0.01, 1e6, 0.2, [0.01, 1, 100, 1e4, 1e6]),
        (27.5, 33, 0.1, [28, 30, 32]),
        (27.5, 33, 0.7, [27.5, 33]),
    ],
)
def test_as_many_round_numbers_are_marked_as_have_room(low, high, apart, marks):
    assert round_numbers(low, high, apart) == pytest.approx(marks)


def test_no_figure_without_gates(folder):
    folder.add({GATE: "a"}, 0, curves={"val/loss": [3.0, 2.0]})
    assert plots.memory_lengths(find(load(folder.save({})))) is None


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("data_dependent", ["data_dependent"]),
        ("data_dependent · heads=4 · expand_k=0.5", ["data_dependent · heads=4", "expand_k=0.5"]),
        ("x" * 40, ["x" * 12 + "…" + "x" * 12]),
    ],
)
def test_names_are_broken_between_factors(name, lines):
    assert titled(name).split("\n") == lines
