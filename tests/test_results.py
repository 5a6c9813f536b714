"""What results/README.md and README.md say of results/ is what the CSV files there say; the figures draw from them."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from gla_ablate.experiment import load_experiment, trials

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAGE = (RESULTS / "README.md").read_text()
LADDER = ["none", "fixed_decay", "data_dependent_scalar", "data_dependent"]


def written(x: float, digits: int = 3) -> str:
    return f"{x:.{digits}f}".replace("-", "−")


def losses(gate: str) -> pd.Series:
    table = pd.read_csv(RESULTS / "paper_ablation/trials.csv")
    own = table[(table["model.gate"] == gate) & (table["model.heads"] == 4)]
    assert (own["status"] == "finished").all()
    return own.set_index("seed")["value"].sort_index()


@pytest.mark.parametrize(("worse", "better"), list(pairwise(LADDER)))
def test_neighbours_of_the_ladder_differ_as_the_page_says(worse, better):
    difference = losses(better) - losses(worse)  # seed by seed
    assert len(difference) == 5 and difference.notna().all()
    half = stats.t.ppf(0.975, 4) * difference.std() / 5**0.5
    mean, low, high = difference.mean(), difference.mean() - half, difference.mean() + half
    assert high < 0
    assert f"| {worse} → {better} | {written(mean)} | {written(low)} … {written(high)} |" in PAGE


def test_the_headline_names_the_means():
    text = (ROOT / "README.md").read_text()
    alt = text[text.index("![validation loss: no gate") :].partition("]")[0]
    assert all(f" {losses(gate).mean():.3f}" in alt for gate in LADDER)


@pytest.mark.parametrize(
    "name", ["paper_ablation", "lr_per_gate", "gate_family", "length", "mqar_state_size", "mad", "chunk_size"]
)
def test_kept_trials_are_those_of_the_experiment_as_it_stands(name):
    """By their identity, which a change of any value changes."""
    kept = pd.read_csv(RESULTS / name / "trials.csv")
    expected = trials(load_experiment(ROOT / f"experiments/{name}.yaml"))
    assert set(kept["id"]) == {trial.id for trial in expected}
    assert (kept["status"] == "finished").all()


def test_figures_are_drawn_from_the_files(tmp_path):
    subprocess.run([sys.executable, RESULTS / "figures.py", tmp_path], check=True, timeout=300)
    for name in ("headline.png", "state_size.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (RESULTS / name).is_file() and name in PAGE
