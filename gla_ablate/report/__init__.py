"""From an experiment's folder to its answer: tables, curves and a page of Markdown and of HTML.

`write_report` reads `experiment.json` and the trials' own files, and writes into `report/`:

- `results.csv`, a row per grid point, and `trials.csv`, a row per trial, both in grid order and full precision; with
  `best_over` also `best.csv`, a row per variant;
- `effects.csv`, what each factor does, and `pairs.csv`, which points differ, both with intervals over seeds;
- figures: `curves.png`, the curves with a band over seeds; `metric.png`, the metric of every point with its seeds;
  `effects.png`, what each factor does; `heatmap.png`, two factors at once; `cost.png`, the metric against its cost;
  `memory.png`, how long the gates of each layer and head remember;
  with `eval.lengths` also `lengths.csv`, a row per grid point and length, and `lengths.png`;
- `tensorboard/`, the same for TensorBoard (`board`);
- `report.md`, which opens with the answer and embeds the rest, and `report.html`, the same in one file.

It may be called at any time and any number of times: trials that haven't finished are listed, not averaged.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from gla_ablate.report import board, csvs, plots, terminal
from gla_ablate.report.document import Image
from gla_ablate.report.findings import find
from gla_ablate.report.html import html
from gla_ablate.report.markdown import markdown
from gla_ablate.report.page import document
from gla_ablate.report.trials import load
from gla_ablate.status import replace

__all__ = ["write_report"]


def write_report(experiment_dir: Path, console: Console | None = None) -> None:
    """Write `experiment_dir/report/` and print the table on `console` where one is given.

    Raises `ConfigError` if `experiment_dir` holds no experiment. Every file is replaced whole, so that a reader never
    sees half of one; a file of an earlier report that this one doesn't have is removed.
    """
    experiment = load(experiment_dir)
    found = find(experiment)
    folder = experiment_dir / "report"
    folder.mkdir(exist_ok=True)
    images = []
    for name, plot, caption in PLOTS:
        image = plot(found)
        if image is None:
            (folder / name).unlink(missing_ok=True)
        else:
            replace(folder / name, image)
            images.append(Image(name, image, caption))
    blocks = document(found, images)
    for name, content in (
        ("results.csv", csvs.results_csv(found)),
        ("best.csv", csvs.best_csv(found)),
        ("trials.csv", csvs.trials_csv(experiment)),
        ("lengths.csv", csvs.lengths_csv(found)),
        ("effects.csv", csvs.effects_csv(found)),
        ("pairs.csv", csvs.pairs_csv(found)),
        ("report.md", markdown(blocks)),
        ("report.html", html(experiment.name, blocks)),
    ):
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            replace(folder / name, content.encode())
    board.write(experiment_dir, found, blocks)
    if console is not None:
        terminal.show(console, found, str(folder / "report.md"))


PLOTS = (
    (
        "curves.png",
        plots.curves,
        "Mean over seeds; the band reaches from the lowest seed to the highest. Dashed: not finished. "
        "The first fifth of training may leave a panel.",
    ),
    ("metric.png", plots.metric_by_point, "Each tick is a seed, the disc their mean, the bar ± one sample std."),
    (
        "lengths.png",
        plots.at_lengths,
        "Evaluation at lengths that nothing was trained on, in multiples of the length of training, which the dashed "
        "line marks: the mean over all positions of rows of each length; and by position in the longest rows, each "
        "place the mean since the one before. Mean over seeds; the band reaches from the lowest seed to the highest. "
        "What is much worse than the rest leaves a panel.",
    ),
    (
        "effects.png",
        plots.factor_effects,
        "What each level changes against its factor's reference, all else the same, and the 95 % interval over "
        "seeds, an arrow where it goes on. Hollow: a tie, the interval contains 0.",
    ),
    (
        "heatmap.png",
        plots.heat_map,
        "The two factors that do most, if two can be crossed without losing a level; a cell averages over what all "
        "cells have of the others. Hatched: no value, or too little in common with the rest. A cell much worse than "
        "the rest is as pale as the palest.",
    ),
    (
        "cost.png",
        plots.cost,
        "The metric against what a point costs, bars ± one sample std; along the thin line stand those that no other "
        "beats in both. A triangle: much worse than the panel shows.",
    ),
    (
        "memory.png",
        plots.memory_lengths,
        "What the gates do after training: tokens until a head has forgotten all but 1/e, which is −1 over the mean "
        "log decay on the validation data, at most the length of a row; the geometric mean over seeds.",
    ),
)
