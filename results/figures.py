"""The two pictures of this folder that no single report has, from the CSV files beside it: `headline.png`, the loss of
each kind of gate with its seeds, and `state_size.png`, recall against the size of the recurrent state.

    python results/figures.py [FOLDER]      (into this folder, or another)
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
LADDER = {  # of paper_ablation, from the top: a gate, what it is, and its colour
    "none": ("no gate", "#D55E00"),
    "fixed_decay": ("fixed decay a head (RetNet)", "#E69F00"),
    "data_dependent_scalar": ("data-dependent, a head", "#56B4E9"),
    "data_dependent": ("data-dependent, a channel (GLA)", "#0072B2"),
}
LINES = {
    "data_dependent": ("data_dependent", "#0072B2"),
    "data_dependent_scalar": ("data_dependent_scalar", "#56B4E9"),
    "none": ("none", "#D55E00"),
    "fixed_decay": ("fixed_decay", "#E69F00"),
}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 160}


def headline(folder: Path) -> Figure:
    """Validation loss of the gates at four heads, a tick a seed; how much each step down the ladder brings."""
    trials = pd.read_csv(folder / "paper_ablation/trials.csv")
    trials = trials[trials["model.heads"] == 4]
    figure = Figure(figsize=(7.2, 1.9))
    axes = figure.add_subplot()
    means = {gate: trials.loc[trials["model.gate"] == gate, "value"].mean() for gate in LADDER}
    before = None
    for row, (gate, (_, colour)) in enumerate(LADDER.items()):
        values = trials.loc[trials["model.gate"] == gate, "value"]
        axes.barh(row, means[gate], color=colour, height=0.62, alpha=0.85)
        axes.vlines(values, row - 0.31, row + 0.31, color="black", lw=0.8)
        gain = "" if before is None else f"  ({means[gate] - before:+.3f})".replace("-", "−")
        axes.text(values.max() + 0.03, row, f"{means[gate]:.3f}{gain}", va="center")
        before = means[gate]
    axes.set_yticks(range(len(LADDER)), [name for name, _ in LADDER.values()])
    axes.invert_yaxis()
    axes.set_xlim(0, 2.45)
    axes.tick_params(length=0)
    axes.set_xlabel("validation loss (nats a byte); a tick is a seed")
    return figure


def state_size(folder: Path) -> Figure:
    """Accuracy of associative recall against numbers in the recurrent state, each variant at its best learning rate."""
    best = pd.read_csv(folder / "mqar_state_size/best.csv")
    figure = Figure(figsize=(5.4, 3.0))
    axes = figure.add_subplot()
    for gate, (name, colour) in LINES.items():
        own = best[(best["model.mixer"] == "gla") & (best["model.gate"] == gate)].sort_values("state_size")
        draw = {"color": colour, "marker": "o", "ms": 4, "lw": 1.6, "capsize": 2, "label": name}
        axes.errorbar(own["state_size"], own["mean"], own["std"], **draw)
    soft = best[best["model.mixer"] == "softmax"]
    axes.errorbar(
        soft["state_size"], soft["mean"], soft["std"], color="#555555", marker="s", ms=5, ls="", label="softmax"
    )
    axes.legend(frameon=False, loc="lower right")
    axes.set_xscale("log", base=2)
    axes.set_xlim(1600, 45_000)
    axes.set_xticks([2048, 4096, 8192, 16384, 32768], ["2k", "4k", "8k", "16k", "32k"])
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("numbers in the state of all layers")
    axes.set_ylabel("accuracy, 8 pairs in 64 tokens")
    axes.grid(axis="y", color="#E6E6E6", lw=0.6)
    return figure


def main(out: Path) -> None:
    for name, draw in (("headline", headline), ("state_size", state_size)):
        with matplotlib.rc_context(STYLE):
            draw(HERE).savefig(out / f"{name}.png", bbox_inches="tight", pad_inches=0.08)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
