"""`match: params`: as many parameters at every point as at its baseline."""

from __future__ import annotations

from pathlib import Path

import pytest

from gla_ablate.config import ModelConfig
from gla_ablate.data import build_source
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import Trial, load_experiment, trials
from gla_ablate.matching import SLACK, of_ffn
from gla_ablate.model import count_parameters
from gla_ablate.model.shapes import ffn_width

GATES = "[{name: none}, {name: data_dependent, rank: 4}, {name: data_dependent, rank: 64}]"
AGAINST_NONE = "report: {baseline: {model.gate: {name: none}}}\n"


@pytest.fixture
def expand(tmp_path: Path):
    def run(text: str, *overrides: str) -> list[Trial]:
        file = tmp_path / "t.yaml"
        file.write_text(f"name: t\nbase: [tiny]\n{text}")
        return trials(load_experiment(file, list(overrides)))

    (tmp_path / "tiny.yaml").write_text(
        "model: {dim: 64, layers: 2, heads: 2}\n"
        "data: {name: mqar, vocab_size: 64, seq_len: 32, batch_size: 2, train_examples: 8, val_tokens: 64}\n"
    )
    return run


def parameters(trial: Trial) -> int:
    return count_parameters(trial.config.model, build_source(trial.config.data).vocab_size)


def near(trial: Trial, other: Trial) -> bool:
    return abs(parameters(trial) - parameters(other)) <= SLACK * parameters(other)


@pytest.mark.parametrize("match", ["params", "{params: model.ffn_ratio}", "{params: model.dim}"])
def test_points_have_as_many_parameters_as_the_baseline(expand, match):
    grid = f"grid: {{model.gate: {GATES}}}\n{AGAINST_NONE}"
    before, after = expand(grid), expand(f"{grid}match: {match}\n")
    assert parameters(before[2]) > 1.1 * parameters(before[0])
    assert all(near(trial, before[0]) for trial in after)
    assert after[0].config == before[0].config  # which is the measure, and stays as it is
    assert after[2].id != before[2].id and after[2].point == before[2].point
    changed = after[2].config.model.dim != before[2].config.model.dim
    assert changed == ("model.dim" in match)


def test_the_width_keeps_to_the_coarsest_multiple_that_is_near_enough(expand):
    _, small, large = expand(f"grid: {{model.gate: {GATES}}}\nset: {{model.ffn_multiple: 24}}\nmatch: params\n")
    for trial in (small, large):
        model = trial.config.model
        assert ffn_width(model) % model.ffn_multiple == 0 and 24 % model.ffn_multiple in (0, 8)
    assert large.config.model.ffn_multiple in (8, 16, 24)


def test_every_setting_of_the_other_factors_has_a_measure_of_its_own(expand):
    found = expand(f"grid: {{model.gate: {GATES}, model.dim: [64, 128]}}\n{AGAINST_NONE}match: params\n")
    small, large = found[::2], found[1::2]
    assert parameters(large[0]) > 3 * parameters(small[0])
    assert all(near(trial, small[0]) for trial in small) and all(near(trial, large[0]) for trial in large)


@pytest.mark.parametrize("baseline", ["", "report: {baseline: {model.gate.name: none}}\n"])
def test_a_gates_options_are_free_where_the_baseline_sets_its_name(expand, baseline):
    """Without a baseline the first point is the measure, which here is the same."""
    text = "grid: {model.gate.name: [none, data_dependent], data.batch_size: [2]}\nmatch: params\n"
    none, dependent = expand(text + baseline)
    assert near(dependent, none) and dependent.config.model.gate["rank"] == 16


@pytest.mark.parametrize("match", ["params", "{params: model.dim}"])
def test_a_transformer_of_any_width_can_be_solved_for(expand, match):
    grid = "grid: {model.mixer: [gla, softmax]}\nreport: {baseline: {model.mixer: gla}}"
    gla, softmax = expand(f"{grid}\nset: {{model.dim: 768, model.layers: 1, model.heads: 4}}\nmatch: {match}\n")
    assert near(softmax, gla)


@pytest.mark.parametrize("match", ["params", "{params: model.dim}"])
def test_other_mixers_have_as_many_parameters_too(expand, match):
    mixers = "[gla, softmax, [gla, softmax]]"
    found = expand(
        f"set: {{model.gate.rank: 32, model.short_conv: 4, model.softmax_heads: 4}}\n"
        f"grid: {{model.mixer: {mixers}}}\nreport: {{baseline: {{model.mixer: gla}}}}\nmatch: {match}\n"
    )
    assert all(near(trial, found[0]) for trial in found)
    assert all(trial.config.model.dim % 8 == 0 for trial in found)  # four heads of an even width
    assert [trial.config.model.mixer for trial in found] == ["gla", "softmax", ["gla", "softmax"]]


def test_a_point_whose_baseline_is_excluded_is_measured_all_the_same(expand):
    text = f"grid: {{model.gate: {GATES}, model.chunk_size: [32, 64]}}\n{AGAINST_NONE}match: params\n"
    none, *others = expand(f"{text}exclude: [{{model.gate.name: none, model.chunk_size: 32}}]\n")
    assert none.config.model.chunk_size == 64 and len(others) == 4
    assert all(near(trial, none) for trial in others)


def test_the_measure_is_the_grid_s_own_point_where_it_has_one(expand):
    """A baseline that names a gate means the one of the grid, with its rank, and a reference is followed there."""
    named = "report: {baseline: {model.gate.name: data_dependent}}\nmatch: params\n"
    none, dependent = expand(f"grid: {{model.gate: [{{name: none}}, {{name: data_dependent, rank: 64}}]}}\n{named}")
    assert dependent.config.model.ffn_ratio == ModelConfig().ffn_ratio and near(none, dependent)
    other = expand(
        'set: {model.expand_v: "${model.expand_k}"}\ngrid: {model.expand_k: [0.5, 1.0], model.heads: [1, 2]}\n'
        "exclude: [{model.expand_k: 0.5, model.heads: 2}]\nreport: {baseline: {model.expand_k: 0.5}}\nmatch: params\n"
    )
    small = other[0]
    assert small.config.model.expand_v == 0.5 and all(near(trial, small) for trial in other)


def test_a_width_stays_within_what_a_head_can_have(expand):
    text = f"grid: {{model.gate: {GATES}}}\nset: {{model: {{dim: 512, heads: 1, expand_k: 1.0}}}}\n"
    baseline = "report: {baseline: {model.gate: {name: data_dependent, rank: 64}}}\n"
    found = expand(f"{text}{baseline}match: {{params: model.dim}}\n")
    assert all(trial.config.model.dim <= 512 and near(trial, found[2]) for trial in found)


def test_layers_can_be_matched_too(expand):
    two, four = expand("grid: {model.layers: [2, 4]}\nmatch: {params: model.dim}\n")
    assert near(four, two) and four.config.model.dim < two.config.model.dim
    assert four.config.model.layers == 4


def test_an_override_is_matched_as_well(expand):
    none, *_, dependent = expand(f"grid: {{model.gate: {GATES}}}\nmatch: params\n", "model.dim=96")
    assert none.config.model.dim == dependent.config.model.dim == 96 and near(dependent, none)


@pytest.mark.parametrize("baseline", ["", AGAINST_NONE])
def test_a_points_model_is_the_same_whatever_part_of_the_grid_is_run(expand, baseline):
    text = f"grid: {{model.gate: {GATES}, model.layers: [1, 2]}}\n{baseline}match: params\n"
    ids = {trial.id for trial in expand(text)}
    for part in (
        expand(text, "model.gate={name: data_dependent, rank: 64}"),
        expand(text, "model.layers=2"),
        expand(text, "model.gate={name: data_dependent, rank: 4}", "model.layers=2"),
        expand(f"{text}exclude: [{{model.gate.name: none}}]\n"),
        expand(f"{text}exclude: [{{model.layers: 1}}]\n"),
    ):
        assert part and {trial.id for trial in part} <= ids


def test_an_option_of_one_choice_on_the_command_line_leaves_the_measure_as_it_is(expand):
    text = "grid: {model.gate.name: [none, data_dependent], model.layers: [1, 2]}\nmatch: params\n"
    none = expand(text)[0]
    (wide, _) = expand(text, "model.gate.name=data_dependent", "model.gate.rank=64")
    assert wide.config.model.gate["rank"] == 64 and near(wide, none)


def test_an_override_of_what_the_baseline_fixes_holds_for_the_measure_too(expand):
    baseline = "report: {baseline: {model.gate.name: none, model.layers: 2}}\n"
    none, *others = expand(f"grid: {{model.gate: {GATES}}}\n{baseline}match: params\n", "model.layers=3")
    (alone,) = expand("grid: {model.gate: [{name: none}]}\n", "model.layers=3")
    assert none.config == alone.config and all(near(other, none) for other in others)


def test_a_value_that_the_grid_does_not_have_is_held_against_the_baseline_too(expand):
    text = f"grid: {{model.gate: {GATES}, model.layers: [1, 2]}}\n{AGAINST_NONE}match: params\n"
    none, *others = expand(text, "model.layers=3")
    assert none.config.model.layers == 3 and all(near(trial, none) for trial in others)


DATA = "data: [{name: mqar, vocab_size: 64, train_examples: 8}, {name: mqar, vocab_size: 4096, train_examples: 8}]"


@pytest.mark.parametrize(
    "baseline", ["", AGAINST_NONE, "report: {baseline: {model.gate: {name: none}, data.vocab_size: 64}}\n"]
)
def test_a_larger_vocabulary_makes_no_model_narrower(expand, baseline):
    found = expand(f"grid: {{model.gate: {GATES}, {DATA}}}\n{baseline}match: params\n")
    small, large = found[::2], found[1::2]
    assert parameters(large[0]) > 3 * parameters(small[0]) and small[0].config.model == large[0].config.model
    assert all(near(trial, small[0]) for trial in small) and all(near(trial, large[0]) for trial in large)


def test_without_a_baseline_the_measure_is_the_first_point_with_the_same_data(expand):
    zipped = "zip: [{data.vocab_size: [64, 4096], model.dim: [64, 128]}]\n"
    found = expand(f"grid: {{data.batch_size: [2, 4], model.gate: {GATES}}}\n{zipped}match: params\n")
    small, large = found[::2], found[1::2]
    assert small[0].config.model.dim == 64 and large[0].config.model.dim == 128
    assert all(trial.config.model.ffn_ratio == ModelConfig().ffn_ratio for trial in (small[0], large[0]))
    assert all(near(trial, small[0]) for trial in small) and all(near(trial, large[0]) for trial in large)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('"${model.dim}"', "match: solves for model.dim, which model.gate.rank refers to"),
        ('"${model.${oc.env:NO_SUCH_VARIABLE,dim}}"', "which model.gate.rank refers to"),
        ('"${optim.warmup_steps}", optim.warmup_steps: "${model.dim}"', "which model.gate.rank refers to"),
        ('"${model.${model.dim}}", model.dim: heads', "model.dim: got 'heads', takes int"),
    ],
)
def test_a_reference_to_what_is_solved_for_is_a_mistake(expand, text, says):
    grid = "match: {params: model.dim}\ngrid: {model.layers: [1, 2]}\n"
    with pytest.raises(ConfigError) as raised:
        expand(f"{grid}set: {{model.gate.name: data_dependent, model.gate.rank: {text}}}\n")
    assert says in str(raised.value)
    if "solves" in says:  # not to what stays
        one, two = expand(f'{grid}set: {{model.gate.rank: "${{model.heads}}"}}\n')
        assert near(two, one) and two.config.model.gate["rank"] == 2


def test_a_measure_that_is_no_model_is_named(expand):
    text = "grid: {model.heads: [3, 2]}\nexclude: [{model.heads: 3}]\nmatch: params\n"
    with pytest.raises(
        ConfigError, match=r"match: model\.heads=3, which is the measure without .*: model\.heads: got 3"
    ):
        expand(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("match: parms\n", "match: got 'parms', takes params, or {params: KEY}"),
        ("match: {params: model.dims}\n", "match.params: got 'model.dims', did you mean 'model.dim'?"),
        ("match: {params: model.dim, flops: model.dim}\n", "match: got {"),
        ("match: [params]\n", "match: got ['params'], takes"),
        ("match: params\ngrid: {model.ffn_ratio: [2.0, 3.0]}\n", "match: solves for model.ffn_ratio, which the grid"),
        ("match: params\ngrid: {model: [{ffn_multiple: 8}, {ffn_multiple: 16}]}\n", "solves for model.ffn_multiple"),
        ("match: {params: model.dim}\nzip: [{model.dim: [64, 128], model.heads: [2, 4]}]\n", "{params: model.ffn_r"),
        (
            f"grid: {{model.gate: {GATES}}}\nmatch: params\nset: {{model.ffn_ratio: 0.1, model.ffn_multiple: 1}}\n",
            "parameters, as the one that it is matched to has: it has too many, ",
        ),
        (
            "match: params\ngrid: {model.dim: [64, 512]}\n",
            " without a SwiGLU; what helps is a report.baseline at each size that the grid varies, "
            "another model.ffn_ratio, or leaving match out (at model.dim=512)",
        ),
        (
            "match: params\ngrid: {model.dim: [1024, 16]}\nreport: {baseline: {model.dim: 1024}}\n",
            "parameters, as the one that it is matched to has: it has too few, ",
        ),
    ],
    ids=lambda text: " ".join(text.split())[:40],
)
def test_what_cannot_be_matched_is_a_mistake(expand, text, says):
    with pytest.raises(ConfigError) as raised:
        expand(text)
    assert says in str(raised.value)


@pytest.mark.parametrize("dim", [30, 64, 100, 1000])
@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_a_width_is_met_to_the_unit(dim, multiple):
    """Width / dim · dim is more than the width in floats, now and then, and would be rounded up."""
    widths = range(multiple, 200 * multiple, multiple)
    assert all(ffn_width(of_ffn(ModelConfig(dim=dim), width, multiple)) == width for width in widths)
