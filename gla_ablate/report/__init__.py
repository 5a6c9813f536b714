"""From an experiment's folder to its answer: tables, curves and a page of Markdown.

`write_report` reads `experiment.json` and the trials' own files, and writes into `report/`:

- `results.csv`, a row per grid point, and `trials.csv`, a row per trial, both in grid order and full precision;
- figures: `curves.png`, the curves with a band over seeds; `metric.png`, the metric of every point with its seeds;
  `effects.png`, what each factor does; `heatmap.png`, two factors at once; `cost.png`, the metric against its cost;
- `tensorboard/`, the same for TensorBoard (`board`);
- `report.md`, which opens with the answer and embeds the rest.

It may be called at any time and any number of times: trials that haven't finished are listed, not averaged.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from gla_ablate.report import board, plots, render, tables
from gla_ablate.report.labels import Labels
from gla_ablate.report.points import points
from gla_ablate.report.trials import load

__all__ = ["write_report"]


def write_report(experiment_dir: Path, console: Console | None = None) -> None:
    """Write `experiment_dir/report/` and print the table on `console` where one is given.

    Raises `ConfigError` if `experiment_dir` holds no experiment. Every file is replaced whole, so that a reader never
    sees half of one; a plot of an earlier report that this one doesn't have is removed.
    """
    experiment = load(experiment_dir)
    grid = points(experiment)
    labels = Labels(experiment.factors, [point.values for point in grid])
    folder = experiment_dir / "report"
    folder.mkdir(exist_ok=True)
    captions, figures = {}, []
    for name, plot, caption in PLOTS:
        image = plot(grid, labels, experiment.settings)
        if image is None:
            (folder / name).unlink(missing_ok=True)
        else:
            replace(folder / name, image)
            captions[name] = caption
            figures.append((name, image, caption))
    replace(folder / "results.csv", tables.results_csv(experiment, grid).encode())
    replace(folder / "trials.csv", tables.trials_csv(experiment).encode())
    replace(folder / "report.md", render.markdown(experiment, grid, labels, captions).encode())
    page = render.markdown(experiment, grid, labels, {})
    board.write(experiment_dir, experiment, grid, labels, page, figures)
    if console is not None:
        render.show(console, experiment, grid, labels, str(folder / "report.md"))


PLOTS = (
    (
        "curves.png",
        plots.curves,
        "Mean over seeds; the band reaches from the lowest seed to the highest. Dashed: not finished. "
        "The first fifth of training may leave a panel.",
    ),
    ("metric.png", plots.metric_by_point, "Each tick is a seed, the disc their mean, the bar ± one sample std."),
    (
        "effects.png",
        plots.factor_effects,
        "What each level changes against its factor's reference, all else the same, and the 95 % interval over "
        "seeds, an arrow where it goes on. Hollow: a tie, the interval contains 0.",
    ),
    (
        "heatmap.png",
        plots.heat_map,
        "The two factors that do most; a cell averages over what all cells have of the others. Hatched: no "
        "value. A cell much worse than the rest is as pale as the palest.",
    ),
    (
        "cost.png",
        plots.cost,
        "The metric against what a point costs, bars ± one sample std; along the thin line stand those that no other "
        "beats in both. A triangle: much worse than the panel shows.",
    ),
)


def replace(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, path)
