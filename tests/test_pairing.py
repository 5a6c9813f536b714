"""Which point is another's baseline."""

import pytest

from gla_ablate.errors import ConfigError
from gla_ablate.experiment import load_experiment, trials
from gla_ablate.pairing import Pairing, filled

NONE, SMALL, LARGE = ({"name": "none"}, {"name": "low_rank", "rank": 4}, {"name": "low_rank", "rank": 64})


def grid(**factors):
    return [dict(zip(factors, values, strict=True)) for values in zip(*factors.values(), strict=True)]


def held_against(points, baseline, **options):
    pairing = Pairing(points, baseline, **options)
    return [[i] if pairing.is_one(point) else pairing.of(point) for i, point in enumerate(points)]


def test_a_point_is_held_against_the_one_that_differs_in_the_baselines_keys_alone():
    points = grid(gate=[NONE, SMALL, NONE, SMALL], heads=[1, 1, 2, 2])
    assert held_against(points, {"gate": NONE}) == held_against(points, {"gate.name": "none"}) == [[0], [0], [2], [2]]
    assert held_against(points, {"gate": NONE}, ignored=["heads"]) == [[0], [0, 2], [2], [0, 2]]


def test_a_baseline_may_set_an_option_of_its_choice():
    points = grid(gate=[NONE, SMALL, LARGE], heads=[1, 1, 1])
    assert held_against(points, {"gate": SMALL}) == [[1], [1], [1]]
    assert held_against(points, {"gate.name": "low_rank"}) == [[1, 2], [1], [2]]  # two could be the first's


def test_options_of_a_name_that_the_baseline_sets_need_not_be_equal():
    points = [{"gate": NONE, "gate.tau": 1}, {"gate": SMALL, "gate.tau": 2}]
    assert held_against(points, {"gate.name": "none"}) == [[0], [0]]


def test_options_that_every_name_has_are_to_be_equal():
    points = [{"data.name": name, "data.seq_len": length} for name in ("mqar", "text") for length in (64, 128)]
    assert held_against(points, {"data.name": "mqar"}) == [[0], [1], [0], [1]]


def test_what_the_grid_does_not_vary_is_nobodys_value():
    assert held_against(grid(gate=[NONE, SMALL]), {"gate.name": "none", "heads": 1}) == [[], []]


def test_what_a_point_does_not_set_is_as_in_its_configuration():
    values = {"gate": {"name": "low_rank", "rank": 16}, "heads": 1}
    assert filled(
        {"gate": {"name": "low_rank"}}, {"gate": {"name": "low_rank", "rank": 16}, "dim": 3}, lambda: values
    ) == {
        "gate": {"name": "low_rank"},
        "gate.rank": 16,
    }
    assert filled({"gate": SMALL}, {"gate": LARGE}, lambda: 1 / 0) == {"gate": SMALL}


def test_match_takes_a_baseline_that_names_what_the_grid_does_not_vary(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(
        "name: t\nbase: [model/tiny, data/mqar]\nset: {model.gate: {rank: 64}}\n"
        "grid: {model.gate.name: [none, data_dependent], model.layers: [1, 2]}\nmatch: params\n"
        "report: {baseline: {model.gate: {name: data_dependent, rank: 64}, model.heads: 2}}\n"
    )
    none, *_, one = trials(load_experiment(file))
    assert one.config.model.gate["rank"] == 64 and one.config.model.ffn_ratio == 8 / 3 < none.config.model.ffn_ratio


def test_match_takes_the_reports_baseline(tmp_path):
    """Its rank is the grid's, so that the point of that rank stays as it is. A baseline that sets the rank alone leaves
    the name as it is: a gate without a rank is held against none in the report, and has nothing to match."""
    file = tmp_path / "t.yaml"
    baseline = "{model.gate: {name: data_dependent, rank: 4}}"
    gates = "[{name: none}, {name: data_dependent, rank: 4}, {name: data_dependent, rank: 64}]"
    file.write_text(
        f"name: t\nbase: [model/tiny, data/mqar]\ngrid: {{model.gate: {gates}, model.heads: [1, 2]}}\n"
        f"report: {{baseline: {baseline}}}\nmatch: params\n"
    )
    found = trials(load_experiment(file))
    points = [trial.point for trial in found]
    pairing = Pairing(points, load_experiment(file).report.baseline)
    ratios = [trial.config.model.ffn_ratio for trial in found]
    ones = [i for i, point in enumerate(points) if pairing.is_one(point)]
    assert [points[i]["model.gate"]["rank"] for i in ones] == [4, 4] and ratios[ones[0]] == ratios[ones[1]] == 8 / 3
    assert ratios[4] < 8 / 3
    file.write_text(file.read_text().replace(baseline, "{model.gate.rank: 4}"))
    with pytest.raises(
        ConfigError, match=r"match: the baseline of model\.gate=\{name: none\}.*gate 'none' has no such"
    ):
        trials(load_experiment(file))
