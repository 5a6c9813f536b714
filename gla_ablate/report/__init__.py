"""From an experiment's folder to its answer: tables, curves and a page of Markdown and of HTML.

`write_report` reads `experiment.json` and the trials' own files, and writes into `report/`:

- `results.csv`, a row per grid point, and `trials.csv`, a row per trial, both in grid order and full precision;
- `effects.csv`, what each factor does, and `pairs.csv`, which points differ, both with intervals over seeds;
- `curves.png`, the curves with a band over seeds, and `metric.png`, the metric of every point with its seeds;
- `report.md`, which opens with the answer and embeds the rest, and `report.html`, the same in one file.

It may be called at any time and any number of times: trials that haven't finished are listed, not averaged.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from gla_ablate.report import csvs, plots, terminal
from gla_ablate.report.document import Image
from gla_ablate.report.findings import PLOTTED, find
from gla_ablate.report.html import html
from gla_ablate.report.markdown import markdown
from gla_ablate.report.page import document
from gla_ablate.report.trials import load

__all__ = ["write_report"]


def write_report(experiment_dir: Path, console: Console | None = None) -> None:
    """Write `experiment_dir/report/` and print the table on `console` where one is given.

    Raises `ConfigError` if `experiment_dir` holds no experiment. Every file is replaced whole, so that a reader never
    sees half of one; a plot of an earlier report that this one doesn't have is removed.
    """
    experiment = load(experiment_dir)
    found = find(experiment)
    folder = experiment_dir / "report"
    folder.mkdir(exist_ok=True)
    foremost = f" The best {PLOTTED} of {len(found.shown):,} points." if len(found.shown) > PLOTTED else ""
    images = []
    for name, image, caption in (
        ("curves.png", plots.curves(found.shown, found.labels, experiment.settings), CURVES),
        ("metric.png", plots.metric_by_point(found.foremost, found.labels, experiment.settings), METRIC + foremost),
    ):
        if image is None:
            (folder / name).unlink(missing_ok=True)
        else:
            replace(folder / name, image)
            images.append(Image(name, image, caption))
    blocks = document(found, images)
    for name, content in (
        ("results.csv", csvs.results_csv(experiment, found.grid)),
        ("trials.csv", csvs.trials_csv(experiment)),
        ("effects.csv", csvs.effects_csv(found)),
        ("pairs.csv", csvs.pairs_csv(found)),
        ("report.md", markdown(blocks)),
        ("report.html", html(experiment.name, blocks)),
    ):
        replace(folder / name, content.encode())
    if console is not None:
        terminal.show(console, found, str(folder / "report.md"))


CURVES = (
    "Mean over seeds; the band reaches from the lowest seed to the highest. Dashed: not finished. "
    "The first fifth of training may leave a panel."
)
METRIC = "Each tick is a seed, the disc their mean, the bar ± one sample std."


def replace(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, path)
