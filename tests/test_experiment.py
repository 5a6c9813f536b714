import json
import re
from pathlib import Path

import pytest

from gla_ablate.errors import ConfigError
from gla_ablate.experiment import identity, load_experiment, record, trials
from gla_ablate.model import GATES
from gla_ablate.parts import CONFIGS, SCALES

EXPERIMENTS = CONFIGS.parent / "experiments"
GATE = """
from gla_ablate.model import Gate, register_gate

@register_gate("{name}")
class Mine(Gate):
    formula, decay_shape, source = "{formula}", "none", "a test"
    def __init__(self, shape, *, floor: float = 0.5):
        super().__init__()
    def forward(self, x):
        return None
"""


@pytest.fixture
def expand(tmp_path: Path):
    """Expands the experiment that a YAML text describes, under the name t and on a tiny model and task."""

    def run(text: str, *overrides: str):
        file = tmp_path / "t.yaml"
        base = "" if "base:" in text else "base: [tiny]\n"
        file.write_text(f"name: t\n{base}{text}")
        experiment = load_experiment(file, list(overrides))
        return trials(experiment)

    (tmp_path / "tiny.yaml").write_text(
        "model: {dim: 32, layers: 1, gate: {name: data_dependent, rank: 4}}\n"
        "data: {name: mqar, vocab_size: 64, seq_len: 32, batch_size: 2, train_examples: 8, val_tokens: 64}\n"
    )
    return run


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_experiment_expands_and_says_what_it_asks(path):
    found = trials(load_experiment(path))
    assert len({trial.id for trial in found}) == len(found) > 1
    more = r".*\n(?:# .*\n)*"
    head = re.match(
        rf"# Question: {more}# Expected: {more}# Run: (.*)\n(?:# .*\n)*# Cost: (\d+) trials", path.read_text()
    )
    assert head[1].startswith(f"python run.py experiments/{path.name}")
    assert int(head[2]) == len(found)
    assert path.stem == load_experiment(path).name


@pytest.mark.parametrize(
    ("report", "mode"),
    [
        ("metric: val/loss", "min"),
        ("metric: val/accuracy", "max"),
        ("metric: val/accuracy, mode: min", "min"),
        ("metric: train/tokens_per_s", "max"),
        ("metric: val/loss, mode: auto", "min"),
    ],
)
def test_the_better_end_of_a_metric_is_known_unless_it_is_said(report, mode, expand, tmp_path):
    expand(f"report: {{{report}}}\n")
    assert load_experiment(tmp_path / "t.yaml").report.mode == mode


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_part_makes_a_trial(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # the example in data/text.yaml reads this project
    file, name = tmp_path / "t.yaml", f"{path.parent.name}/{path.stem}"
    over = path.parent == SCALES
    file.write_text(f"name: t\nbase: [{'model/mini' if over else name}]\n")
    assert len(trials(load_experiment(file, parts=[name] if over else []))) == 1
    assert path.read_text().startswith("# ")


def test_grid_zip_exclude_and_seeds_make_the_trials_in_order(expand):
    found = expand(
        """
grid:
  model.gate: [{name: data_dependent, rank: 8}, {name: none}]
  model.heads: [1, 2]
zip: [{model.dim: [32, 64], optim.lr: [2e-3, 1e-3]}]
exclude: [{model.gate.name: none, model.heads: 2}]
seeds: [3, 1]
"""
    )
    seen = [
        (t.config.model.gate["name"], t.config.model.heads, t.config.model.dim, t.config.optim.lr, t.seed)
        for t in found
    ]
    gates_and_heads = [("data_dependent", 1), ("data_dependent", 2), ("none", 1)]
    wanted = [(*gh, *dl, seed) for gh in gates_and_heads for dl in [(32, 2e-3), (64, 1e-3)] for seed in (3, 1)]
    assert seen == wanted
    assert list(found[0].point) == ["model.gate", "model.heads", "model.dim", "optim.lr"]
    assert all(t.config.seed == t.seed for t in found)


def test_layers_lie_over_one_another_in_order(expand, tmp_path):
    (tmp_path / "wide.yaml").write_text("model: {dim: 64}\noptim: {lr: 0.5}\n")
    text = "base: [tiny, wide]\nset: {model.heads: 4, optim.lr: 0.25}\ngrid: {optim.lr: [0.125]}"
    (trial,) = expand(text, "model.layers=3")
    config = trial.config
    assert (config.model.dim, config.model.heads, config.optim.lr, config.model.layers) == (64, 4, 0.125, 3)
    assert expand(text, "optim.lr=1.0")[0].config.optim.lr == 1.0


def test_a_part_beside_the_experiment_comes_before_the_shipped_one(expand, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("model: {dim: 48}")
    assert expand("base: [model/tiny]")[0].config.model.dim == 48


def test_the_axis_of_a_choice_carries_no_option_over(expand):
    both = expand("grid: {model.gate: [{name: fixed_decay}, {name: data_dependent}]}")
    assert [t.config.model.gate for t in both] == [
        {"name": "fixed_decay"},
        {"name": "data_dependent", "rank": 16, "tau": 16.0},  # its own default, not the part's 4
    ]
    names = expand("grid: {model.gate.name: [fixed_decay, data_dependent]}")
    assert [t.config.model.gate for t in names] == [
        {"name": "fixed_decay"},
        {"name": "data_dependent", "rank": 4, "tau": 16.0},
    ]


def test_mixers_and_lists_of_them_can_be_an_axis(expand):
    text = "set: {model.layers: 4, model.window: 8}\ngrid: {model.mixer: [gla, [gla, gla, softmax], softmax]}"
    found = expand(text)
    assert [t.config.model.mixer for t in found] == ["gla", ["gla", "gla", "softmax"], "softmax"]
    assert [t.config.model.window for t in found] == [None, 8, 8]
    assert [t.id[:-19] for t in found] == ["mixer-gla", "mixer-gla_gla_softmax", "mixer-softmax"]
    assert [t.id for t in expand(text, "model.mixer=[gla, gla, softmax]")] == [found[1].id]
    assert [t.id for t in expand(text, "model.mixer=gla")] == [found[0].id]
    assert [t.id for t in expand(f"{text}\nexclude: [{{model.mixer: [gla, gla, softmax]}}]")] == [
        found[0].id,
        found[2].id,
    ]


def test_the_data_source_can_be_an_axis(expand):
    found = expand("grid: {data.name: [mqar, stdlib]}")
    assert [t.config.data["batch_size"] for t in found] == [2, 2]
    assert "vocab_size" in found[0].config.data and "vocab_size" not in found[1].config.data


def test_an_override_fixes_its_axis_and_keeps_the_identity(expand):
    text = "grid: {model.gate: [{name: none}, {name: fixed_decay}], model.heads: [1, 2]}"
    full = expand(text)
    assert [t.id for t in expand(text, "model.heads=2")] == [t.id for t in full if t.config.model.heads == 2]
    assert [t.id for t in expand(text, "model.gate.name=none")] == [t.id for t in full[:2]]
    assert [t.point for t in expand(text, "model.heads=4", "model.gate={name: none}")] == [
        {"model.gate": {"name": "none"}, "model.heads": 4}
    ]


def test_seeds_on_the_command_line_replace_the_seeds(expand):
    assert [t.seed for t in expand("seeds: [0, 1, 2]", "seeds=[7]")] == [7]


def test_conditions_are_judged_on_the_grid_of_the_file(expand):
    text = """
grid: {model.gate.name: [none, fixed_decay], model.heads: [1, 2]}
exclude: [{model.gate.name: none, model.heads: 2}]
report: {baseline: {model.gate.name: none}}
"""
    assert len(expand(text, "model.gate.name=fixed_decay")) == 2


def test_a_point_has_one_identity_whatever_the_yaml_around_it(expand, tmp_path):
    (tmp_path / "none.yaml").write_text("model: {gate: {name: none}, heads: 1}")
    ids = {
        expand("grid: {model.gate: [{name: none}, {name: fixed_decay}]}\nset: {model.heads: 1}")[0].id[-14:],
        expand("grid: {model.heads: [1, 2]}\nset: {model.gate.name: none}\nseeds: [0, 1]")[0].id[-14:],
        expand("base: [tiny, none]")[0].id[-14:],
        expand("", "model.heads=1", "model.gate={name: none}", "trainer.log_every=3")[0].id[-14:],
    }
    assert len(ids) == 1


@pytest.mark.parametrize("override", ["model.heads=1", "optim.lr=2e-3", "data.pairs=2", "trainer.max_steps=7"])
def test_what_can_change_the_result_changes_the_identity(expand, override):
    assert identity(expand("")[0].config) != identity(expand("", override)[0].config)


def test_the_identity_follows_a_plugin_but_not_its_place(expand, tmp_path, scratch_registry):
    hashes = {}
    for folder, name, formula in [("a", "mine", "1"), ("b", "mine", "1"), ("c", "mine", "2")]:
        GATES._classes.pop("mine", None)
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gates.py").write_text(GATE.format(name=name, formula=formula))
        (trial,) = expand(f"plugins: [{folder}/gates.py]\nset: {{model.gate: {{name: mine}}}}")
        assert trial.config.plugins == [str(tmp_path / folder / "gates.py")]
        assert trial.config.model.gate == {"name": "mine", "floor": 0.5}
        hashes[folder] = identity(trial.config)
    assert hashes["a"] == hashes["b"] != hashes["c"]


def test_folder_names_are_readable_safe_and_bounded(expand):
    text = """
grid:
  model.gate: [{name: data_dependent, rank: 8, tau: 2.0}]
  model.tie_embeddings: [true]
  optim.lr: [1e-3]
  data: [{name: mqar, vocab_size: 64, pairs: 2, power: 0.5, train_examples: 16, val_tokens: 128}]
"""
    (trial,) = expand(text)
    assert re.fullmatch(
        r"data_dependent-rank8-tau2\.0-tie_embeddings-True-lr0\.001-mqar-.*-[0-9a-f]{12}-seed0", trial.id
    )
    assert len(trial.id) <= 110
    assert expand("")[0].id.startswith("base-")


def test_the_record_is_what_a_report_needs(expand, tmp_path):
    found = expand("grid: {model.gate: [{name: none}, {name: fixed_decay}]}\nseeds: [0, 1]")
    content = record(load_experiment(tmp_path / "t.yaml"), found, "python run.py t.yaml")
    assert json.loads(json.dumps(content)) == content
    assert content["factors"] == ["model.gate"]
    settings = {"metric": "val/loss", "mode": "min", "pick": "last", "baseline": {}, "best_over": []}
    settings["expect_equal"] = {"over": "", "tolerance": 0.002}
    assert content["report"] == settings
    assert content["trials"][1] == {"id": found[1].id, "point": {"model.gate": {"name": "none"}}, "seed": 1}


@pytest.mark.parametrize("given", ["optim.lr", "[optim.lr]"])
def test_the_best_is_taken_over_one_factor_or_several(expand, tmp_path, given):
    rates = "zip: [{optim.lr: [1e-3, 2e-3], optim.warmup_steps: [5, 10]}]\n"
    found = expand(f"{rates}report: {{best_over: {given}}}", "optim.lr=1e-3")  # an override fixes the axis, which stays
    experiment = load_experiment(tmp_path / "t.yaml", ["optim.lr=1e-3"])
    assert record(experiment, found, "")["report"]["best_over"] == ["optim.lr"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: x", r"nmae: no such key, did you mean 'name'\?"),
        ("set: {model.dmi: 3}", r"model\.dmi: no such key, did you mean 'dim'\?"),
        ("set: {seed: 3}", r"seed: stands at the top of an experiment, as seeds"),
        ("base: [model/tniy]", r"base: no part 'model/tniy', did you mean 'model/tiny'\?"),
        ("base: model/tiny", r"base: got 'model/tiny', takes list\[str\]"),
        ("plugins: [gone.py]", r"plugins: no such file '.*gone\.py'"),
        ("grid: {model.heads: 2}", r"grid\.model\.heads: got 2, takes list"),
        ("grid: {model.heads: []}", r"grid\.model\.heads: empty list"),
        ("grid: {model.heads: [2, two]}", r"model\.heads: got 'two', takes int"),
        ("grid: {model.heads: [2, 3]}", r"model\.heads: got 3.*\(at model\.heads=3\)"),
        ("grid: {model.gate: [none]}", r"model\.gate: got 'none', takes a mapping, such as \{name: none\}"),
        ("grid: {model.gate: [{name: none, rank: 2}]}", r"model\.gate\.rank: gate 'none' has no such option"),
        ("grid: {model.mixer: [gla, sofmax]}", r"model\.mixer: got 'sofmax', did you mean 'softmax'\?"),
        ("grid: {model.mixer: [gla, [gla]]}", r"two points are the same trial: model\.mixer=gla and .*=\[gla\]"),
        (
            "set: {model.mixer: softmax}\ngrid: {model.gate.name: [none, fixed_decay]}",
            r"two points are the same trial: model\.gate\.name=none and model\.gate\.name=fixed_decay",
        ),
        (
            "set: {model.mixer: softmax}\ngrid: {model.heads: [1, 2]}",
            r"two points are the same trial: model\.heads=1 and model\.heads=2",
        ),
        ("set: {model.window: 8}", r"model\.window: got 8, of softmax layers, which no trial has"),
        ("grid: {model.window: [null, 8]}", r"model\.window: got 8, of softmax layers, which no trial has"),
        ("set: {model.mixer: softmax, model.rope: true}", r"model\.rope: got true, of gla layers, which no trial has"),
        ("grid: {model.heads: [2, 2]}", r"two points are the same trial: model\.heads=2 and model\.heads=2"),
        (
            "grid: {model.gate: [{name: data_dependent}, {name: data_dependent, rank: 16}]}",
            r"two points are the same trial: model\.gate=\{name: data_dependent\} and .*rank: 16\}",
        ),
        ("grid: {trainer.log_every: [1, 2]}", r"two points are the same trial"),
        (
            "grid: {model.heads: [1, 2]}\nexclude: [{model.heads: 4}]",
            r"exclude\[0\]: \{model\.heads=4\} matches no point",
        ),
        ("exclude: [{model.haeds: 4}]", r"exclude\[0\]\.model\.haeds: no such key, did you mean 'model\.heads'\?"),
        ("exclude: [{model.heads: 2}]", r"exclude: leaves no point of the grid"),
        (
            "report: {baseline: {model.gate.name: nnone}}",
            r"report\.baseline: \{model\.gate\.name=nnone\} matches no point",
        ),
        (
            "set: {model.expand_k: 0.5}\ngrid: {model.expand_v: ['${model.expand_k}', 1.0]}\n"
            "report: {baseline: {model.expand_v: 0.5}}",
            r"report\.baseline: \{model\.expand_v=0\.5\} is no point as the grid writes it",
        ),
        (
            "grid: {model.gate.name: [none, fixed_decay]}\nreport: {baseline: {model.gate.name: none, model.dim: 64}}",
            r"report\.baseline: \{model\.gate\.name=none, model\.dim=64\} matches no point",
        ),
        (
            "grid: {model.gate: [{name: data_dependent}, {name: data_dependent, rank: 4}, {name: none}]}\n"
            "report: {baseline: {model.gate: {name: data_dependent}}}",
            r"report\.baseline: \{model\.gate=\{name: data_dependent\}\} is both .*rank: 4.*; takes what tells ",
        ),
        ("report: {metric: gate/layer0/head0/memry}", r"report\.metric: no such metric .*gate/layer0/head0/memory"),
        (
            "report: {metric: gate/layer9/head0/memory}",
            r"got gate/layer9/head0/memory, and of a trial's layers \(gated: 0",
        ),
        ("report: {metric: val/los}", r"report\.metric: no such metric 'val/los', did you mean 'val/loss'\?"),
        ("report: {metric: val/accuracy/../x}", r"report\.metric: no such metric 'val/accuracy/\.\./x'"),
        (
            "report: {metric: val/accuracy/4_pairs_in_32}",
            r"report\.metric: got val/accuracy/4_pairs_in_32, which data mqar doesn't log \(valid: val/accuracy: ",
        ),
        ("report: {metric: val/bpb}", r"got val/bpb, which data mqar doesn't log \(valid: .*, val/accuracy\)"),
        (
            "set: {data: {name: stdlib}}\nreport: {metric: val/accuracy}",
            r"report\.metric: got val/accuracy, which data stdlib doesn't log \(valid: val/loss, val/ppl, val/bpb\)",
        ),
        (
            "set: {data.pairs: [1, 4]}\nreport: {metric: val/accuracy/2_pairs_in_32}",
            r"which data mqar doesn't log \(valid: val/accuracy/1_pairs_in_32, val/accuracy/4_pairs_in_32\)",
        ),
        ("report: {mode: mni}", r"report\.mode: got 'mni', did you mean 'min'\?"),
        ("report: {picks: last}", r"report\.picks: no such key, did you mean 'pick'\?"),
        (
            "grid: {model.heads: [1, 2]}\nreport: {best_over: model.haeds}",
            r"report\.best_over: the grid doesn't vary 'model\.haeds', did you mean 'model\.heads'\? \(it varies: ",
        ),
        (
            "report: {best_over: [optim.lr]}",
            r"report\.best_over: the grid doesn't vary .* \(it varies: nothing\)",
        ),
        ("report: {best_over: 3}", r"report\.best_over: got 3, takes str \| list\[str\]"),
        (
            "grid: {model.heads: [1, 2]}\nreport: {best_over: [model.heads, model.heads]}",
            r"report\.best_over: model\.heads stands twice",
        ),
        (
            "grid: {model.gate: [{name: none}]}\nreport: {best_over: model.gate, baseline: {model.gate: {name: none}}}",
            r"report\.best_over: report\.baseline fixes model\.gate",
        ),
        (
            "grid: {model.heads: [1, 2]}\nreport: {expect_equal: {over: model.haeds}}",
            r"report\.expect_equal\.over: the grid doesn't vary 'model\.haeds', did you mean 'model\.heads'\?",
        ),
        ("report: {expect_equal: {tolerance: 0.1}}", r"report\.expect_equal\.over: missing"),
        (
            "grid: {model.heads: [1]}\nreport: {expect_equal: {over: model.heads, tolerance: 1}}",
            r"report\.expect_equal\.tolerance: got 1\.0, takes a share",
        ),
        ("report: {expect_equal: model.heads}", r"report\.expect_equal: got 'model\.heads', takes "),
        (
            "grid: {optim.lr: [1e-3, 2e-3]}\nreport: {best_over: optim.lr, expect_equal: {over: optim.lr}}",
            r"report\.expect_equal\.over: optim\.lr is in report\.best_over, too",
        ),
        ("seeds: []", r"seeds: empty list"),
        ("seeds: 3", r"seeds: got 3, takes list\[int\]"),
        ("seeds: [0, 0]", r"seeds: 0 stands twice"),
        ("seeds: [-1]", r"seeds\[0\]: got -1"),
        ("seeds: [true]", r"seeds\[0\]: got True, takes int"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_key(expand, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        expand(text)
    assert "t.yaml: " in str(error.value)
    assert "command line" not in str(error.value)


def test_a_setting_that_a_task_validates_may_be_the_metric(expand):
    assert expand("set: {data.pairs: [1, 4]}\nreport: {metric: val/accuracy/4_pairs_in_32}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads", r"command line: got 'model\.heads', takes key=value"),
        ("=3", r"command line: got '=3', takes key=value"),
        ("model.heads=[1", r"command line: model\.heads: 1:3: "),
        ("model.haeds=4", r"command line: model\.haeds: no such key, did you mean 'heads'\?"),
        ("model.gate=on", r"command line: model\.gate: got 'on', takes a mapping"),
        ("trainer.max_steps=1:30", r"command line: trainer\.max_steps: got '1:30', takes int"),
        ("seeds=0", r"command line: seeds: got 0, takes list\[int\]"),
        ("model.heads=5", r"t\.yaml with model\.heads=5: model\.heads: got 5"),
        ("model.gate.rank=4", r"model\.gate\.rank: gate 'none' has no such option"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_as_such(expand, override, message):
    with pytest.raises(ConfigError, match=message):
        expand("grid: {model.gate: [{name: none}, {name: fixed_decay}]}", override)


def test_a_mistake_in_a_part_is_blamed_on_the_part(expand, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {dmi: 3}")
    with pytest.raises(ConfigError, match=r"mine\.yaml: model\.dmi: no such key"):
        expand("base: [tiny, mine]")


@pytest.mark.parametrize("name", ["..", ".", "../up", "a/b", "''", "'a b'", "naïve"])
def test_a_name_that_leaves_the_output_folder_is_refused(tmp_path, name):
    file = tmp_path / "t.yaml"
    file.write_text(f"name: {name}\n")
    with pytest.raises(ConfigError, match=r"t\.yaml: name: got"):
        load_experiment(file)


def test_an_experiment_without_a_name_is_refused(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("base: [model/tiny]\n")
    with pytest.raises(ConfigError, match="name: missing"):
        load_experiment(file)


def test_a_grid_follows_references_point_by_point(expand):
    found = expand("set: {optim.warmup_steps: '${model.dim}'}\ngrid: {model.dim: [32, 64]}\n")
    assert [trial.config.optim.warmup_steps for trial in found] == [32, 64]
    assert expand("grid: {model.dim: [32]}\n", "optim.warmup_steps=${model.dim}")[0].config.optim.warmup_steps == 32


def test_a_reference_to_nothing_is_blamed_on_its_file(expand):
    with pytest.raises(ConfigError, match=r"t\.yaml: optim\.lr: "):
        expand("set: {optim.lr: '${model.width}'}\n")
