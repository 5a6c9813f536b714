"""Parts that the command line lays over an experiment: `--part fast` is the same grid in another size."""

import json
import math
import re
from pathlib import Path

import pytest

from gla_ablate.cli import main
from gla_ablate.config import write_config
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import load_experiment, trials
from gla_ablate.model import counter
from gla_ablate.parts import CONFIGS, SCALES, over, spread
from tests.test_trial import read, run

EXPERIMENTS = sorted((CONFIGS.parent / "experiments").glob("*.yaml"))
TASK = "data: {name: mqar, vocab_size: 64, seq_len: 32, batch_size: 2, train_examples: 8, val_tokens: 64}\n"
GRID = """
name: t
base: [task]
set: {model: {dim: 32, layers: 1, gate: {name: data_dependent, rank: 4}}}
grid: {model.heads: [1, 2, 4], optim.lr: [1e-3, 2e-3]}
seeds: [0, 1]
"""


@pytest.fixture
def expand(tmp_path: Path):
    """The trials of an experiment under parts and overrides; `write` puts the files that it needs in its folder."""

    def run(parts: list[str], *overrides: str, text: str = GRID, **files: str):
        for name, content in {"task": TASK, "t": text, **files}.items():
            (tmp_path / f"{name}.yaml").write_text(content)
        return trials(load_experiment(tmp_path / "t.yaml", overrides, parts))

    return run


def test_a_part_is_what_its_keys_would_be_on_the_command_line(expand):
    part = "model: {heads: 2, gate: {name: fixed_decay}}\noptim.warmup_steps: 3\nseeds: [5]\n"
    typed = ("model.heads=2", "model.gate={name: fixed_decay}", "optim.warmup_steps=3", "seeds=[5]")
    laid = expand(["p"], p=part)
    assert [t.id for t in laid] == [t.id for t in expand([], *typed)]
    assert [(t.config.model.heads, t.config.optim.lr, t.seed) for t in laid] == [(2, 1e-3, 5), (2, 2e-3, 5)]


def test_a_value_that_the_grid_lacks_takes_the_place_of_its_axis(expand):
    assert [t.point for t in expand(["p"], p="model: {heads: 8}\nseeds: [0]")] == [
        {"model.heads": 8, "optim.lr": lr} for lr in (1e-3, 2e-3)
    ]


def test_later_parts_lie_over_earlier_ones_and_the_users_values_over_all(expand):
    files = {"a": "model: {dim: 64, layers: 3, heads: 1}\nseeds: [1]", "b": "model.layers: 2\nseeds: [2]"}
    (first, _) = expand(["a", "b"], "model.dim=48", **files)
    assert (first.config.model.dim, first.config.model.layers, first.config.model.heads) == (48, 2, 1)
    assert {t.seed for t in expand(["a", "b"], "seeds=[7]", **files)} == {7}
    assert expand(["b", "a"], **files)[0].config.model.layers == 3


@pytest.mark.parametrize(
    ("part", "override", "gate"),
    [
        ("model.gate.name: none", "model.gate={name: fixed_decay}", {"name": "fixed_decay"}),
        ("model: {gate: {name: fixed_decay}}", "model.gate.name=none", {"name": "none"}),
        ("model.gate.rank: 8", "model.gate.name=none", {"name": "none"}),
        ("model.gate: {name: data_dependent, tau: 2}", "model.gate.rank=8",
         {"name": "data_dependent", "rank": 8, "tau": 2.0}),
        ("model.gate: {tau: 2}", "model.gate.rank=8", {"name": "data_dependent", "rank": 8, "tau": 2.0}),
    ],
)  # fmt: skip
def test_an_override_of_a_choice_takes_a_parts_options_away_with_their_name(expand, part, override, gate):
    assert expand(["p"], override, p=part)[0].config.model.gate == gate


def test_keys_common_to_all_choices_outlive_a_new_name():
    assert over({"data.seq_len": 8, "data.pairs": 2}, {"data.name": "stdlib"}) == {
        "data.seq_len": 8,
        "data.name": "stdlib",
    }
    layer = {"model": {"gate": {"name": "none"}, "dim": 3}, "optim.lr": 1}
    assert spread(layer) == {"model.gate": {"name": "none"}, "model.dim": 3, "optim.lr": 1}


def test_a_part_is_looked_for_beside_the_experiment_then_among_the_shipped(expand):
    assert expand(["fast"])[0].config.trainer.max_steps == 3
    assert expand(["model/mini"])[0].config.model.dim == 256
    assert expand(["fast"], fast="trainer: {max_steps: 9}")[0].config.trainer.max_steps == 9


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["fsat"], r"^--part: no part 'fsat', did you mean 'fast'\? \(valid: .*340M_7B_full.*, or a file beside it\)"),
        (["fast", "fast"], r"^--part: fast stands twice"),
        (["fast", "scale/fast"], r"^--part: scale/fast stands twice"),
        ([""], r"^--part: no part ''"),
        (["p"], r"^\S*/p\.yaml: model\.dmi: no such key, did you mean 'dim'\?"),
        (["seed"], r"^\S*/seed\.yaml: seed: stands at the top of an experiment, as seeds"),
        (["seeds"], r"^\S*/seeds\.yaml: seeds: got 3, takes list\[int\]"),
        (["none"], r"^\S*/none\.yaml: seeds: empty list"),
        (["report"], r"^\S*/report\.yaml: report: no such key"),
        (["five"], r"^\S*t\.yaml with --part five: model\.heads: got 5"),
        (["list"], r"^\S*/list\.yaml.*takes a mapping"),
    ],
)
def test_a_mistake_in_a_part_is_told_with_its_file(expand, parts, message):
    files = {"p": "model: {dmi: 3}", "seed": "seed: 3", "seeds": "seeds: 3", "none": "seeds: []",
             "report": "report: {mode: max}", "five": "model: {heads: 5}", "list": "- 1"}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        expand(parts, **files)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modle", "modle: no such key, did you mean 'model'?"),
        ("model.dmi", "model.dmi: no such key, did you mean 'dim'?"),
        ("data.pears", "data.pears: data source 'mqar' has no such option, did you mean 'pairs'?"),
        ("model.heads", "model.heads: got {}, takes int"),
        ("seeds", "seeds: got {}, takes list[int]"),
        ("plugins", "plugins: stands at the top of an experiment"),
    ],
)
def test_an_empty_mapping_excuses_no_key(expand, key, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        expand([], f"{key}={{}}")
    with pytest.raises(ConfigError, match=re.escape(message)):
        expand(["p"], p=f"{key}: {{}}")
    head, *rest = key.split(".")
    if rest:
        with pytest.raises(ConfigError, match=re.escape(message)):
            expand(["p"], p=f"{head}: {{{rest[0]}: {{}}}}")


@pytest.mark.parametrize("key", ["data", "model", "model.gate", "optim", "trainer"])
def test_an_empty_mapping_for_a_section_changes_nothing(expand, key):
    part = "model: {gate: {name: fixed_decay}}\ndata.seq_len: 64\noptim: {beta1: 0.8}\ntrainer.max_steps: 7\n"
    plain = [trial.id for trial in expand(["p"], p=part)]
    assert [trial.id for trial in expand(["p"], f"{key}={{}}", p=part)] == plain
    assert [trial.id for trial in expand(["none", "p"], none=f"{key}: {{}}", p=part)] == plain


def test_seeds_in_a_part_of_base_are_refused_with_where_they_may_stand(expand):
    with pytest.raises(ConfigError, match=r"fast\.yaml: seeds: stands at the top of an experiment, .*--part"):
        expand([], text="name: t\nbase: [scale/fast]\n")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_shipped_experiment_has_a_fast_form_with_every_point_of_its_grid(path):
    whole, fast = trials(load_experiment(path)), trials(load_experiment(path, parts=["fast"]))
    assert [t.point for t in fast] == [t.point for t in whole if t.seed == whole[0].seed]
    for trial in fast:
        assert trial.config.trainer.max_steps <= 3
        assert trial.config.data["batch_size"] * trial.config.data["seq_len"] <= 4096


FULL = [pytest.param(f.stem, f.stem.split("_")[:2], id=f.stem) for f in sorted(SCALES.glob("*_full.yaml"))]


@pytest.mark.parametrize(("part", "scale"), FULL)
def test_a_full_part_has_the_papers_number_of_parameters_and_tokens(expand, part, scale):
    size, tokens = (float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]] for text in scale)
    text = "name: t\nbase: [model/mini]\ngrid: {model.gate: [{name: data_dependent}, {name: none}]}\n"
    first, second = expand([part], text=text)
    assert counter()(first.config.model, 32_000) == pytest.approx(size, rel=0.12)  # 374M and 1366M, by the paper's name
    data, trainer = first.config.data, first.config.trainer
    assert trainer.max_steps * data["batch_size"] * data["seq_len"] == pytest.approx(tokens, rel=1e-4)
    assert second.config.model.gate == {"name": "none"}  # whose axis it leaves alone


TEXT = ["paper_ablation", "lr_per_gate", "gating", "gate_family", "hybrid", "length"]


@pytest.mark.parametrize("part", [part.values[0] for part in FULL])
@pytest.mark.parametrize("name", TEXT)
def test_an_experiment_on_text_has_a_form_at_the_papers_scale(name, part):
    path = CONFIGS.parent / f"experiments/{name}.yaml"
    whole, full = trials(load_experiment(path)), trials(load_experiment(path, parts=[part]))
    assert {t.config.data["name"] for t in full} == {"hub"}
    assert {t.config.model.gate["name"] for t in full} == {t.config.model.gate["name"] for t in whole}


SMALL = "model: {dim: 16, chunk_size: 16}\ntrainer: {max_steps: 2, val_every: 2, log_every: 1}\nseeds: [3]\n"


def test_the_command_keeps_what_ran_under_a_part_in_a_folder_of_its_own(tmp_path, capsys, monkeypatch):
    for name, content in {"task": TASK, "t": GRID, "small": SMALL}.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    words = [str(tmp_path / "t.yaml"), "--part", "small", "model.heads=1", "optim.lr=1e-3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["run.py", *words])
    assert main(words) == 0
    folder = tmp_path / "t-small"
    record = json.loads((folder / "experiment.json").read_text())
    (trial,) = record["trials"]
    assert (record["name"], trial["seed"], trial["point"]) == ("t-small", 3, {"model.heads": 1, "optim.lr": 1e-3})
    assert "--part small model.heads=1" in record["command"]
    assert not (tmp_path / "t").exists()
    assert "# t-small" in (folder / "report/report.md").read_text()
    capsys.readouterr()

    assert main([*words, "--status"]) == 0
    assert "1 finished" in capsys.readouterr().out
    assert main(words) == 0
    assert "1 trials, 1 finished already" in capsys.readouterr().out
    assert main([str(folder / trial["id"]), "--part", "small"]) == 2
    assert re.search(r"error: --part: a trial's folder \(.*\) takes none", capsys.readouterr().err)
    assert main(["--generate", str(folder / trial["id"]), "--part", "small"]) == 2
    assert "--part: doesn't go with --generate" in capsys.readouterr().err


def test_the_fast_form_of_a_shipped_experiment_runs_and_reports(tmp_path):
    path = CONFIGS.parent / "experiments" / "mqar.yaml"
    assert main([str(path), "--part", "fast", "model.heads=1", "--out", str(tmp_path)]) == 0
    results = (tmp_path / "mqar-fast/report/results.csv").read_text().splitlines()
    assert len(results) == 1 + len(trials(load_experiment(path, ["model.heads=1"], ["fast"]))) == 4


def some(n: int) -> range:
    """Two of a grid's trials or three, the last among them."""
    step = -(-n // 2)
    return range((n - 1) % step, n, step)


FAST = [
    pytest.param(path, i, id=f"{path.stem}-{i}")
    for path in EXPERIMENTS
    for i in some(len(trials(load_experiment(path, parts=["fast"]))))
]


@pytest.mark.parametrize(("path", "i"), FAST)
def test_the_fast_form_of_a_shipped_experiment_trains_and_logs_its_metric(path, i, tmp_path):
    experiment = load_experiment(path, parts=["fast"])
    write_config(trials(experiment)[i].config, tmp_path / "config.yaml")
    assert run(tmp_path) == 0
    assert math.isfinite(read(tmp_path, "result.json")["metrics"][experiment.report.metric])
