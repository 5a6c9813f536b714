"""The figure of memory lengths: whose gates it shows, and what it makes of seeds and layers without a gate."""

import math

import numpy as np
import pytest

from gla_ablate.report import plots, write_report
from gla_ablate.report.findings import find
from gla_ablate.report.plots.memory import by_layer_and_head, titled
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
