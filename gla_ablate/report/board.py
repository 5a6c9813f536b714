"""The report in TensorBoard: its table, its figures, the variants' curves over seeds, and what HParams opens with.

`report/tensorboard/` holds, beside the trials' own event files,

- the run `report/tensorboard`: the results as text, every figure as an image, a layout for Custom Scalars that overlays
  the variants and the trials, and the columns of HParams: the factors that vary, and the metric;
- a run a variant (a grid point), `report/tensorboard/LABEL`, with its curves over seeds, `mean/TAG`, `low/TAG` and
  `high/TAG`: TensorBoard doesn't group seeds, and colours a line by its run.

Written without PyTorch or TensorFlow, straight as the records of an event file.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.text import metadata as text
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from gla_ablate.experiment_checks import length_tag
from gla_ablate.grid import flatten
from gla_ablate.hparams import column_types, columns_of
from gla_ablate.report.document import PLOTS, Block, Image
from gla_ablate.report.findings import Findings
from gla_ablate.report.labels import TAG_LABELS, Labels, identity
from gla_ablate.report.lengths import MEASURES, curves_by_position, multiples
from gla_ablate.report.markdown import markdown
from gla_ablate.report.plots.curves import line_of
from gla_ablate.report.points import Point, ranked
from gla_ablate.report.trials import Experiment, Settings, Trial, read_metrics

VARIANTS = 20  # with curves; of more, the best, and the best one's baseline
RUNS = 40  # of more, TensorBoard shows none until asked to
LAYERS = 16  # with a chart of their gates' memory
OWN = re.compile(r"gate/|hp/|lr$|eval/\w+_at_")  # tags that aren't compared as curves
ALSO = ("val/loss", "val/bpb", "val/accuracy", "train/tokens_per_s")  # columns of HParams after the metric
KINDS = {
    bool: api_pb2.DATA_TYPE_BOOL,
    int: api_pb2.DATA_TYPE_FLOAT64,
    float: api_pb2.DATA_TYPE_FLOAT64,
    str: api_pb2.DATA_TYPE_STRING,
}


def write(experiment_dir: Path, found: Findings, blocks: Sequence[Block]) -> None:
    """Bring `report/tensorboard/` up to date; what an earlier report had and this one hasn't is removed.

    `blocks` are the report, whose images go among TensorBoard's. A run's file that would say what it says stays as it
    is; else one of a later name takes its place, which a TensorBoard that runs reads as its continuation, whose values
    take the place of the earlier ones.
    """
    folder = experiment_dir / "report" / "tensorboard"
    experiment = found.experiment
    shown = shown_variants(found.shown, found.labels, experiment)
    runs: dict[str, bytes] = {}
    tags: set[str] = set()  # that some variant has
    for name, point in shown.items():
        curves = with_all_curves(experiment_dir, point)
        logged, values = curves_over_seeds(curves, compared(experiment, curves.trials))
        if logged:
            runs[name] = records(values, newest(experiment_dir, point.trials))
            tags.update(logged)
    page = markdown([block for block in blocks if not isinstance(block, Image) and block != PLOTS])
    summaries = [
        text_value("report/results", re.sub(r"(?<!\\)\[([^]]+)\]\([^)]+\)", r"`\1`", page)),  # links lead nowhere here
        *(image_value(block) for block in blocks if isinstance(block, Image)),
        hparams_value(experiment),
        layout_value(layout(experiment, in_order(tags, experiment.settings))),
    ]
    runs[""] = records([(0, summaries)], newest(experiment_dir, experiment.trials))
    for path in (folder, *folder.glob("*")):
        if path.is_symlink():  # which may lead anywhere
            path.unlink()
    for name, content in runs.items():
        put(folder / name, content)
    for run in folder.iterdir():
        if run.is_dir() and run.name not in runs:
            shutil.rmtree(run)


def put(folder: Path, content: bytes) -> None:
    """Make `content` the one event file of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(folder.glob("events.out.tfevents.*"))
    if not present or present[-1].read_bytes() != content:
        last = re.search(r"\d+$", present[-1].name) if present else None
        part = folder / f".part.{os.getpid()}"  # no name that TensorBoard reads
        part.unlink(missing_ok=True)
        part.write_bytes(content)
        os.replace(part, folder / f"events.out.tfevents.{int(last[0]) + 1 if last else 1:010}")
    else:
        present.pop()
    for old in present:
        old.unlink(missing_ok=True)


def newest(experiment_dir: Path, trials: list[Trial]) -> float:
    """When the newest of the trials' curves was written: the time of a run's events, so that equal trials give equal
    bytes."""
    paths = (experiment_dir / trial.id / "metrics.csv" for trial in trials)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def records(summaries: Iterable[tuple[int, list[Summary.Value]]], time: float) -> bytes:
    """An event file with these (step, values).

    Its first event is older than any trial's: TensorBoard lists runs by that, and gives out its seven colours in the
    order of the list, so that the variants come first and differ in colour.
    """
    file = io.BytesIO()
    writer = RecordWriter(file)
    writer.write(event_pb2.Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
    for step, values in summaries:
        event = event_pb2.Event(wall_time=time, step=step, summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return file.getvalue()


def shown_variants(grid: list[Point], labels: Labels, experiment: Experiment) -> dict[str, Point]:
    """Name of a run → the point that it shows, in grid order."""
    best = ranked(grid, experiment.settings)
    kept = {identity(point.values) for point in best[:VARIANTS]}
    if len(grid) > VARIANTS and best[0].baseline is not None:
        kept.add(identity(best[0].baseline))
    shown: dict[str, Point] = {}
    for point in grid:
        if identity(point.values) in kept:
            name = run_name(labels.point(point.values))
            taken = sum(run_name(labels.point(p.values)) == name for p in shown.values())
            shown[f"{name} ({taken + 1})" if taken else name] = point
    return shown


def run_name(label: str) -> str:
    """A point's label as a folder's name: a slash would nest, a leading dot hide it, and 255 bytes are the most."""
    name = re.sub(r"[\x00-\x1f/\\]", "_", re.sub(r"[\s·]+", ",", label))
    name = f"_{name[1:]}" if name.startswith(".") else name
    return name if len(name.encode()) <= 200 else f"{name[:36]}…{name[-20:]}"  # at most 4 bytes a letter


def with_all_curves(experiment_dir: Path, point: Point) -> Point:
    """The point with every curve that its trials logged, not only those that the report's figures show, those by
    position among them."""
    trials = []
    for trial in point.trials:
        metrics = read_metrics(experiment_dir / trial.id / "metrics.csv")
        curves = dict(iter(metrics.groupby("metric")[["step", "value"]])) | curves_by_position(trial)
        trials.append(replace(trial, curves=curves))
    return replace(point, trials=trials)


def compared(experiment: Experiment, trials: list[Trial]) -> list[str]:
    """The tags whose curves are worth an overlay."""
    tags = set().union(*(trial.curves for trial in trials))
    return [tag for tag in tags if tag == experiment.settings.metric or not OWN.match(tag)]


def in_order(tags: Iterable[str], settings: Settings) -> list[str]:
    """The metric first, then as `TAG_LABELS` has them."""
    order = list(TAG_LABELS)
    return sorted(tags, key=lambda tag: (tag != settings.metric, order.index(tag) if tag in order else len(order), tag))


def curves_over_seeds(point: Point, tags: list[str]) -> tuple[list[str], list[tuple[int, list[Summary.Value]]]]:
    """The tags that have a curve, and (step, values) of all of them: the mean, lowest and highest of the seeds."""
    by_step: dict[int, list[Summary.Value]] = {}
    found = []
    for tag in sorted(tags):
        line = line_of(point, tag)
        if line is None:
            continue
        found.append(tag)
        for kind, values in (("mean", line.mean), ("low", line.low), ("high", line.high)):
            for step, value in zip(line.step.round().astype(int).tolist(), values.tolist(), strict=True):
                by_step.setdefault(step, []).append(Summary.Value(tag=f"{kind}/{tag}", simple_value=value))
    return found, sorted(by_step.items())


def layout(experiment: Experiment, tags: list[str]) -> layout_pb2.Layout:
    """Charts for Custom Scalars: `tags` of the variants, with a band over seeds, of all trials, and the trials' gates.

    The charts with bands are in reverse, for TensorBoard (2.20 and 2.21) reverses them.
    """
    variants = []
    for tag in reversed(tags):
        series = {"value": f"mean/{tag}", "lower": f"low/{tag}", "upper": f"high/{tag}"}
        content = layout_pb2.MarginChartContent(series=[series])
        variants.append(layout_pb2.Chart(title=TAG_LABELS.get(tag, tag), margin=content))
    trials = [overlay(TAG_LABELS.get(tag, tag), re.escape(tag)) for tag in tags]
    logged: set[str] = set().union(*(trial.tags for trial in experiment.trials))
    layers = sorted({int(found[1]) for tag in logged if (found := re.match(r"gate/layer(\d+)/head\d+/memory$", tag))})
    gates = [overlay(f"layer {n}", rf"gate/layer{n}/head\d+/memory") for n in layers[:LAYERS]]
    categories = [
        layout_pb2.Category(title="variants: mean and range over seeds", chart=variants),
        layout_pb2.Category(title="trials", chart=trials, closed=len(experiment.trials) > RUNS),
        layout_pb2.Category(title="memory of the gates (tokens): a line a trial and head", chart=gates, closed=True),
    ]
    return layout_pb2.Layout(category=[category for category in categories if category.chart])


def overlay(title: str, pattern: str) -> layout_pb2.Chart:
    """A chart of all tags that match as a whole, of all runs."""
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{pattern}$"]))


def layout_value(made: layout_pb2.Layout) -> Summary.Value:
    return Summary.Value(
        tag=custom_scalars.CONFIG_SUMMARY_TAG,
        tensor=tensor_util.make_tensor_proto(made.SerializeToString()),
        metadata=custom_scalars.create_summary_metadata(),
    )


def text_value(tag: str, markdown: str) -> Summary.Value:
    return Summary.Value(
        tag=tag,
        tensor=tensor_util.make_tensor_proto(markdown.encode()),
        metadata=text.create_summary_metadata(display_name=None, description=None),
    )


def image_value(image: Image) -> Summary.Value:
    width, height = image.size
    return Summary.Value(
        tag=f"report/{Path(image.name).stem}",
        image=Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=image.content),
        metadata=SummaryMetadata(summary_description=image.caption),
    )


def varied(factors: list[str], points: list[dict[str, Any]]) -> list[str]:
    """The dotted keys of the config that vary over `points`, factor by factor; an option inside a factor's values is a
    key by itself."""
    found: dict[str, Counter[str]] = {}
    for factor in factors:
        for point in points:
            for key, value in flatten({factor: point.get(factor)}).items():
                found.setdefault(key, Counter())[identity(value)] += 1
    return [key for key, values in found.items() if max(values.values()) < len(points)]


def hparams_value(experiment: Experiment) -> Summary.Value:
    """What HParams shows of the trials, which enter themselves: the factors that vary and the seed, the metric first
    among a few others."""
    types = column_types()
    keys = columns_of(varied(experiment.factors, [trial.point for trial in experiment.trials]))
    infos = [
        api_pb2.HParamInfo(name=key, type=KINDS[types[key]], differs=True)
        for key in dict.fromkeys([*keys, "seed"])
        if key in types  # `plugins` isn't
    ]
    logged: set[str] = set().union(*(trial.tags for trial in experiment.trials))
    tags = [tag for tag in (experiment.settings.metric, *ALSO) if tag in logged]
    tags += [tag for kind in MEASURES for m in multiples(experiment.trials) if (tag := length_tag(kind, m)) in logged]
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in dict.fromkeys(tags)]
    about = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    return Summary.Value(
        tag=hparams.EXPERIMENT_TAG,
        tensor=hparams.NULL_TENSOR,
        metadata=hparams.create_summary_metadata(plugin_data_pb2.HParamsPluginData(experiment=about)),
    )
