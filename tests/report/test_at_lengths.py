"""Evaluation at other lengths, as a report tells it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import metadata

from gla_ablate.report import plots, tables, write_report
from gla_ablate.report.findings import find
from gla_ablate.report.labels import identity
from gla_ablate.report.plots.curves import SOLID, Line
from gla_ablate.report.plots.lengths import limit, over_lengths, over_positions
from gla_ablate.report.plots.style import colours_of
from gla_ablate.report.trials import load
from tests.pictures import shows

GATES = [{"name": "data_dependent"}, {"name": "none"}]
LENGTHS = [1, 2, 4]
SEQ_LEN = 8


def losses(gate: int, seed: int, worse: float = 0.5) -> dict[int, float]:
    """At each length."""
    return {m: 2.0 + gate * worse * math.log2(m) + seed / 10 for m in LENGTHS}


def positions(at: dict[int, float], accuracy: bool = False) -> str:
    """Four buckets a row, of which the last is 0.2 above the loss of its length; and none of task's first has a
    target."""
    rows = ["multiple,start,end,tokens,loss,accuracy"]
    for m, loss in at.items():
        for i in range(4):
            seen = [0, "", ""] if accuracy and i == 0 else [8, loss + 0.1 * (i - 1), 0.25 * i if accuracy else ""]
            rows.append(",".join(map(str, [m, i * m * SEQ_LEN // 4, (i + 1) * m * SEQ_LEN // 4, *seen])))
    return "\n".join(rows) + "\n"


def grid(folder, report=None, accuracy: bool = False) -> Path:
    for i, gate in enumerate(GATES):
        for seed in (0, 1):
            at = losses(i, seed)
            curves = {"train/loss": [4.0, 3.0], "val/loss": [at[1]]}
            curves |= {f"eval/loss_at_{m}x": {40: loss} for m, loss in at.items()}
            if accuracy:
                curves |= {"val/accuracy": [0.5]} | {f"eval/accuracy_at_{m}x": {40: 1 / (m + i)} for m in LENGTHS}
            trial = folder.add({"model.gate": gate}, seed, curves)
            (trial / "positions.csv").write_text(positions(at, accuracy))
    return folder.save(report)


def test_the_report_has_a_table_a_figure_and_a_file_of_every_point_at_every_length(folder):
    path = grid(folder, {"metric": "eval/loss_at_4x"})
    write_report(path)
    page = (path / "report/report.md").read_text()
    assert "## At other lengths than trained on" in page and "1× is 8 tokens" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "2.050 ± 0.071" in line]
    assert ["data_dependent", *["2.050 ± 0.071"] * 3] in rows
    assert ["none", "2.050 ± 0.071", "2.550 ± 0.071", "3.050 ± 0.071"] in rows
    assert "![lengths](lengths.png)" in page and "Best: data_dependent, 2.050 ± 0.071 over 2 seeds" in page
    assert "At other lengths" in (path / "report/report.html").read_text()
    table = pd.read_csv(path / "report/lengths.csv")
    assert table["tokens"].tolist() == [8, 16, 32] * 2 and set(table["n"]) == {2}
    assert table["mean"].tolist() == pytest.approx([2.05, 2.05, 2.05, 2.05, 2.55, 3.05], rel=1e-12)
    assert table["metric"].tolist() == [f"eval/loss_at_{m}x" for m in LENGTHS] * 2


def test_without_lengths_nothing_of_them_is_there_and_what_was_is_removed(folder):
    folder.fill([({"a": a}, {0: 1.0 + a}) for a in (0, 1)])
    path = folder.save()
    (path / "report").mkdir()
    for name in ("lengths.png", "lengths.csv"):
        (path / "report" / name).write_text("stale")
    write_report(path)
    assert not [file.name for file in (path / "report").rglob("lengths*")]
    assert "lengths" not in (path / "report/report.md").read_text()


def test_the_figure_has_a_line_of_every_point_over_lengths_and_over_positions(folder):
    found = find(load(grid(folder)))
    image = plots.at_lengths(found)
    for colour in colours_of(found.shown, found.experiment.settings).values():
        assert shows(image, colour)
    none = next(p for p in found.shown if p.values == {"model.gate": GATES[1]})
    lengths, places = over_lengths(none, "loss"), over_positions(none, "loss")
    assert lengths.step.tolist() == LENGTHS and lengths.mean == pytest.approx([2.05, 2.55, 3.05])
    assert lengths.low == pytest.approx([2.0, 2.5, 3.0]) and lengths.high == pytest.approx([2.1, 2.6, 3.1])
    assert places.step.tolist() == [1, 2, 4]  # of rows of 4 times the length of training; 3 is no half octave below 4
    assert places.mean == pytest.approx([2.95, 3.05, 3.2])


@pytest.mark.parametrize("far, height", [(0.5, 2.5), (9.0, 2.0)])
def test_a_loss_that_would_hide_all_others_leaves_the_panel_and_another_stays(far, height):
    lines = {"a": line_at([2.0, 2.01, 2.02]), "b": line_at([2.0, 2.0, 2.0 + far])}
    axes = Figure().subplots()
    limit(axes, lines, lower=True)
    assert axes.get_ylim()[0] < 2.0 and height <= axes.get_ylim()[1] < height + 0.1
    limit(axes, lines, lower=False)
    assert axes.get_ylim()[1] > 2.0 + far


def line_at(values: list[float]) -> Line:
    places = np.array(values)
    return Line(np.arange(1.0, 4.0), places, places, places, SOLID, 1)


def test_where_accuracy_is_the_metric_lengths_are_compared_by_it(folder):
    found = find(load(grid(folder, {"metric": "val/accuracy", "mode": "max"}, accuracy=True)))
    columns = {column.header: column.cells for column in tables.at_lengths(found)}
    assert columns["2×"] == ["0.500 ± 0.000", "0.333 ± 0.000"]
    assert over_positions(found.shown[0], "accuracy").step.tolist() == [2, 4]  # the first has no target
    assert plots.at_lengths(found)


def test_a_seed_that_does_not_count_is_left_out_and_one_that_is_not_finite_is_told(folder):
    for seed, (status, value) in enumerate([("finished", 2.0), ("finished", math.inf), ("diverged", 9.0)]):
        curves = {"val/loss": [1.0], "eval/loss_at_1x": {40: 1.5}, "eval/loss_at_2x": {40: value}}
        folder.add({"a": 0}, seed, curves, status=status)
    folder.add({"a": 1}, 0, {"val/loss": [2.0]})
    path = folder.save()
    found = find(load(path))
    assert [column.cells for column in tables.at_lengths(found)] == [
        ["0", "1"],
        ["1.500 ± 0.000", ""],
        ["not finite", ""],
    ]
    assert over_lengths(found.shown[0], "loss").step.tolist() == [1.0]
    write_report(path)  # without any positions.csv
    assert (path / "report/lengths.png").is_file()


@pytest.mark.parametrize("content", ["", "stale", "multiple,start\n1,2\n", "multiple,start,end,tokens,loss,accuracy\n"])
def test_a_damaged_file_of_positions_is_as_none(folder, content):
    path = grid(folder)
    for file in path.glob("*/positions.csv"):
        file.write_text(content)
    write_report(path)
    assert "the length that the point trained on" in (path / "report/report.md").read_text()


def test_tensorboard_overlays_loss_by_position_and_lists_the_losses_at_lengths(folder):
    path = grid(folder)
    write_report(path)
    runs = EventMultiplexer().AddRunsFromDirectory(str(path / "report")).Reload()
    curve = [(e.step, e.value) for e in runs.Scalars("tensorboard/none", "mean/eval/loss_by_position")]
    assert curve == [(8 * i, pytest.approx(2.85 + 0.1 * i)) for i in range(1, 5)]
    assert not any("_at_" in tag for held in runs.Runs().values() for tag in held["scalars"])
    events = EventAccumulator(str(path / "report/tensorboard")).Reload()
    assert "report/lengths" in events.Tags()["images"]
    content = metadata.parse_experiment_plugin_data(events.PluginTagToContent("hparams")[metadata.EXPERIMENT_TAG])
    names = [info.name.tag for info in content.metric_infos]
    assert names == ["val/loss", *(f"eval/loss_at_{m}x" for m in LENGTHS)]


def test_a_metric_of_one_length_has_no_panel_of_curves(folder):
    experiment = load(grid(folder, {"metric": "eval/loss_at_2x"}))
    assert experiment.settings.panels == ["train/loss", "val/loss"]
    assert [trial.value for trial in experiment.trials] == pytest.approx([2.0, 2.1, 2.5, 2.6])
    assert identity(find(experiment).ranked[0].values) == identity({"model.gate": GATES[0]})
