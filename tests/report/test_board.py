"""The report in TensorBoard: what is in its event files, read back as TensorBoard does."""

from __future__ import annotations

import io
import math
import re
import shutil

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.hparams import api_pb2, metadata

from gla_ablate.config import Config
from gla_ablate.hparams import column_types, flat_hparams
from gla_ablate.report import write_report

GATES = [{"name": "data_dependent", "rank": 16}, {"name": "fixed_decay"}, {"name": "none"}]


def small_grid(folder, report=None, seeds=(0, 1)):
    for i, gate in enumerate(GATES):
        for heads in (2, 4):
            for seed in seeds:
                losses = [4.0, 3.0 + i / 10 + seed / 100, 2.0 + i / 10 + heads / 100 + seed / 100]
                curves = {"train/loss": losses, "val/loss": losses[1:], "train/tokens_per_s": [100.0 + seed] * 3}
                curves |= {"gate/layer0/head0/memory": [9.0], "lr": [0.1], "hp/loss": losses[-1:]}
                size = {"state_size": 8192 // heads, "tokens_per_s": 100.0 + i}
                folder.add({"model.gate": gate, "model.heads": heads}, seed, curves, result=size)
    return folder.save(report)


def read(path) -> EventMultiplexer:
    runs = EventMultiplexer(size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    return runs.AddRunsFromDirectory(str(path)).Reload()


def event_files(path):
    return {file: file.read_bytes() for file in (path / "report/tensorboard").rglob("events*")}


def only(path, tag):
    """The one value of `tag` in the report's own run."""
    (event,) = EventAccumulator(str(path / "report/tensorboard"), size_guidance={"tensors": 0}).Reload().Tensors(tag)
    return event.tensor_proto.string_val[0]


def charts(path):
    layout = layout_pb2.Layout.FromString(only(path, CONFIG_SUMMARY_TAG))
    return [(category, chart) for category in layout.category for chart in category.chart]


def test_the_table_is_there_as_text_without_links_that_lead_nowhere(folder):
    path = small_grid(folder)
    write_report(path)
    page = only(path, "report/results").decode()
    assert "| data_dependent |     2 |" in page and "Best: data_dependent · heads=2" in page
    assert "](" not in page


def test_every_figure_of_the_report_is_there_as_an_image(folder):
    path = small_grid(folder)
    write_report(path)
    events = EventAccumulator(str(path / "report/tensorboard")).Reload()
    figures = sorted((path / "report").glob("*.png"))
    names = ("curves", "metric", "effects", "heatmap", "cost", "memory")
    assert events.Tags()["images"] == [f"report/{name}" for name in names]
    for file in figures:
        (image,) = events.Images(f"report/{file.stem}")
        assert image.encoded_image_string == file.read_bytes()
        pixels = matplotlib.image.imread(io.BytesIO(image.encoded_image_string), format="png")
        assert pixels.shape[:2] == (image.height, image.width)


def test_a_variants_curves_are_the_mean_and_range_over_its_seeds(folder):
    path = small_grid(folder)
    write_report(path)
    runs = read(path / "report")
    values = {
        kind: [(e.step, e.value) for e in runs.Scalars("tensorboard/none,heads=4", f"{kind}/train/loss")]
        for kind in ("mean", "low", "high")
    }
    assert values["low"] == [(10, 4.0), (20, pytest.approx(3.2)), (30, pytest.approx(2.24))]
    assert values["mean"] == [(10, 4.0), (20, pytest.approx(3.205)), (30, pytest.approx(2.245))]
    assert values["high"] == [(10, 4.0), (20, pytest.approx(3.21)), (30, pytest.approx(2.25))]


def test_the_layout_overlays_variants_and_trials_and_names_only_tags_that_exist(folder):
    path = small_grid(folder)
    write_report(path)
    found = read(path / "report")
    tags = {tag for held in found.Runs().values() for tag in held["scalars"]}
    logged = {"train/loss", "val/loss", "train/tokens_per_s", "gate/layer0/head0/memory", "lr", "hp/loss"}
    bands = [chart.title for _, chart in charts(path) if chart.HasField("margin")]
    titles = ["validation loss (nats/token)", "training loss (nats/token)", "throughput (tokens/s)"]
    assert bands[::-1] == titles  # as TensorBoard shows them
    assert [chart.title for category, chart in charts(path) if category.title == "trials"] == titles
    for _, chart in charts(path):
        for series in chart.margin.series:
            assert {series.value, series.lower, series.upper} <= tags
        for pattern in chart.multiline.tag:
            assert len([tag for tag in logged if re.match(pattern, tag)]) == 1
            assert not any(re.match(pattern, tag) for tag in tags)  # trials alone
    assert not any("gate/" in tag or "lr" in tag.split("/") for tag in tags)


@pytest.mark.parametrize("metric", ["val/loss", "train/loss"])
def test_the_metric_comes_first(folder, metric):
    path = small_grid(folder, {"metric": metric})
    write_report(path)
    bands = [chart.margin for _, chart in charts(path) if chart.HasField("margin")]
    assert bands[-1].series[0].value == f"mean/{metric}"
    assert hparams(path).metric_infos[0].name.tag == metric


def hparams(path) -> api_pb2.Experiment:
    events = EventAccumulator(str(path / "report/tensorboard")).Reload()
    return metadata.parse_experiment_plugin_data(events.PluginTagToContent("hparams")[metadata.EXPERIMENT_TAG])


def test_hparams_opens_with_the_factors_that_vary_and_the_metric(folder):
    path = small_grid(folder)
    write_report(path)
    columns = {info.name: info.type for info in hparams(path).hparam_infos}
    assert list(columns) == ["model.gate", "model.gate_options", "model.heads", "seed"]
    assert columns["model.heads"] == columns["seed"] == api_pb2.DATA_TYPE_FLOAT64
    assert columns["model.gate"] == columns["model.gate_options"] == api_pb2.DATA_TYPE_STRING
    assert [info.name.tag for info in hparams(path).metric_infos] == ["val/loss", "train/tokens_per_s"]


@pytest.mark.parametrize(
    ("factor", "values", "columns"),
    [
        ("model.gate", [{"name": "none"}, {"name": "a"}], ["model.gate"]),
        ("model.gate", [{"name": "none"}, {"name": "a", "rank": 4}], ["model.gate", "model.gate_options"]),
        ("model.gate", [{"name": "a", "rank": 4}, {"name": "a", "rank": 8}], ["model.gate_options"]),
        ("model.gate.name", ["none", "a"], ["model.gate"]),
        ("model.gate.rank", [4, 16], ["model.gate_options"]),
        ("data", [{"name": "mqar", "seq_len": 4, "pairs": n} for n in (2, 3)], ["data_options"]),
        ("data", [{"name": "mqar", "seq_len": 4}, {"name": "text", "seq_len": 8}], ["data", "data.seq_len"]),
        ("data.pairs", [2, 4], ["data_options"]),
        ("data.seq_len", [2, 4], ["data.seq_len"]),
        ("optim.lr", [1e-3, 2e-3], ["optim.lr"]),
        ("trainer.max_time", [None, 3.0], ["trainer.max_time"]),
        ("model", [{"heads": 2, "dim": 64}, {"heads": 4, "dim": 64}], ["model.heads"]),
        ("model", [{"dim": 64}, {"dim": 96, "gate": {"name": "a", "rank": 4}}],
         ["model.dim", "model.gate", "model.gate_options"]),
        ("optim", [{"lr": 1e-3, "weight_decay": 0.0}, {"lr": 2e-3}], ["optim.lr", "optim.weight_decay"]),
        ("optim", [{}, {"lr": 2e-3}], ["optim.lr"]),
    ],
)  # fmt: skip
def test_a_factors_columns_are_what_varies_by_keys_that_every_trial_declares(folder, factor, values, columns):
    for value in values:
        folder.add({factor: value, "model.layers": 2}, 0, {"val/loss": [1.0]})
    path = folder.save()
    write_report(path)
    assert [info.name for info in hparams(path).hparam_infos] == [*columns, "seed"]
    assert set(columns) <= column_types().keys()


@pytest.mark.parametrize(("part", "key", "values"), [("model", "chunk_size", [32, "auto"]),
                                                     ("trainer", "max_time", [None, 3.0])])  # fmt: skip
def test_what_may_be_of_two_types_has_one_in_hparams(part, key, values):
    for value in values:
        config = Config()
        setattr(getattr(config, part), key, value)
        assert flat_hparams(config)[f"{part}.{key}"] == str(value)


def test_the_same_trials_give_the_same_files_and_new_ones_later_files(folder):
    path = small_grid(folder)
    write_report(path)
    before = event_files(path)
    write_report(path)
    assert event_files(path) == before and len(before) == 7
    folder.add({"model.gate": GATES[0], "model.heads": 2}, 7, {"val/loss": [3.0, 1.0]})
    folder.save()
    write_report(path)
    after = event_files(path)
    assert len(after) == 7  # one a run
    changed = {file.parent.name: file.name for file in after.keys() - before.keys()}
    assert changed == dict.fromkeys(["tensorboard", "data_dependent,heads=2"], "events.out.tfevents.0000000002")


def test_a_variant_that_the_grid_lost_is_removed(folder):
    path = small_grid(folder)
    write_report(path)
    folder.record["trials"] = folder.record["trials"][:4]
    folder.save()
    write_report(path)
    assert {file.parent.name for file in event_files(path)} == {"tensorboard", "heads=2", "heads=4"}


def test_a_large_grid_shows_its_best_variants_and_the_baseline(folder):
    for a in range(40):
        folder.add({"a": a}, 0, {"val/loss": [1.0 + a]})
    path = folder.save({"baseline": {"a": 39}})
    write_report(path)
    assert {file.parent.name for file in event_files(path)} == {"tensorboard", "a=39", *(f"a={a}" for a in range(20))}


def test_running_and_failed_trials_are_shown_up_to_where_they_came(folder):
    folder.add({"a": 1}, 0, {"val/loss": [3.0, 2.0, math.nan]}, status="failed")
    folder.add({"a": 2}, 0, {"val/loss": [3.0]}, status="running")
    folder.add({"a": 3}, 0, status="queued")
    path = folder.save()
    write_report(path)
    runs = read(path / "report/tensorboard")
    assert [e.value for e in runs.Scalars("a=1", "mean/val/loss")] == [3.0, 2.0]
    assert [e.value for e in runs.Scalars("a=2", "mean/val/loss")] == [3.0]
    assert "a=3" not in runs.Runs()


def test_an_experiment_without_any_curve_is_written_too(folder):
    folder.add({"a": 1}, 0, status=None)
    path = folder.save()
    write_report(path)
    assert "No answer yet" in only(path, "report/results").decode()
    assert charts(path) == []


@pytest.mark.parametrize("value", ["/a/b", "..", ".hidden", "a\nb", "🦜" * 300, "a b·c", "$x[1](y)*"])
def test_any_value_gives_a_variant_a_folder_of_its_own_below_the_report(folder, value):
    for other in (value, f"{value}x" if len(value) > 200 else "other"):
        folder.add({"data.path": other}, 0, {"val/loss": [2.0], "a.b(c)/d+ e": [1.0]})
    path = folder.save()
    write_report(path)
    files = list((path / "report/tensorboard").glob("*/events*"))
    assert len(files) == 2 and len({file.parent for file in files}) == 2
    patterns = [chart.multiline.tag[0] for _, chart in charts(path) if chart.HasField("multiline")]
    assert sum(bool(re.match(pattern, "a.b(c)/d+ e")) for pattern in patterns) == 1


def test_labels_that_become_one_name_are_numbered(folder):
    for i, value in enumerate(("a/b", "a_b", "a\\b")):
        folder.add({"x": value}, 0, {"val/loss": [1.0 + i]})
    path = folder.save()
    write_report(path)
    runs = read(path / "report/tensorboard")
    values = [runs.Scalars(f"x=a_b{number}", "mean/val/loss")[0].value for number in ("", " (2)", " (3)")]
    assert values == [1.0, 2.0, 3.0]


def test_variants_are_listed_before_all_trials(folder):
    """TensorBoard goes by the time of a run's first event, and gives out its few colours in that order."""
    path = small_grid(folder)
    write_report(path)
    runs = read(path / "report/tensorboard")
    assert {runs.FirstEventTimestamp(run) for run in runs.Runs()} == {1.0}


def test_a_report_that_is_cut_off_while_writing_leaves_what_was_there(folder, cut_off):
    path = small_grid(folder)
    write_report(path)
    before = event_files(path)
    folder.add({"model.gate": GATES[0], "model.heads": 2}, 7, {"val/loss": [3.0, 1.0]})
    folder.save()
    cut_off(lambda file: "tensorboard" in file.parts)
    with pytest.raises(KeyboardInterrupt):
        write_report(path)
    assert event_files(path) == before
    assert all("tfevents" not in file.name for file in set((path / "report").rglob("*")) - before.keys())


def test_what_is_in_the_way_of_the_folder_is_an_error_of_the_system(folder):
    path = small_grid(folder)
    (path / "report").mkdir()
    (path / "report/tensorboard").write_text("")
    with pytest.raises(OSError, match="tensorboard"):
        write_report(path)
    assert (path / "report/report.md").exists()


def test_no_link_is_followed_out_of_the_folder(folder, tmp_path):
    path = small_grid(folder)
    write_report(path)
    board = path / "report" / "tensorboard"
    run = next(inner for inner in board.iterdir() if inner.is_dir())
    elsewhere = tmp_path / "elsewhere"
    for own in (run, board):
        own.rename(elsewhere)
        own.symlink_to(elsewhere)
        before = {inner: inner.read_bytes() for inner in elsewhere.rglob("*") if inner.is_file()}
        write_report(path)
        assert {inner: inner.read_bytes() for inner in elsewhere.rglob("*") if inner.is_file()} == before
        assert not own.is_symlink() and list(own.glob("events*"))
        shutil.rmtree(elsewhere)
