import pytest

from gla_ablate.errors import ConfigError
from gla_ablate.grid import build_axes, fix, matches, points, spell

GATES = [{"model.gate": {"name": "data_dependent", "rank": 16}}, {"model.gate": {"name": "none"}}]


def test_axes_are_crossed_and_zipped_keys_vary_together():
    axes = build_axes({"a": [1, 2]}, [{"b": [1, 2], "c": [3, 4]}])
    assert list(points(axes)) == [
        {"a": 1, "b": 1, "c": 3},
        {"a": 1, "b": 2, "c": 4},
        {"a": 2, "b": 1, "c": 3},
        {"a": 2, "b": 2, "c": 4},
    ]


def test_without_axes_there_is_one_point():
    assert list(points(build_axes({}, []))) == [{}]


@pytest.mark.parametrize(
    ("grid", "zips", "message"),
    [
        ({"a": []}, [], r"^grid\.a: empty list"),
        ({}, [{"a": [], "b": []}], r"^zip\[0\]\.a: empty list"),
        ({}, [{"a": [1, 2], "b": [1]}], r"^zip\[0\]: lists of unequal length \(a 2, b 1\)"),
        ({"a": [1]}, [{"a": [1]}], r"^zip\[0\]\.a: already varied by grid"),
        ({}, [{"a": [1]}, {"a": [1]}], r"^zip\[1\]\.a: already varied by zip\[0\]"),
        ({"a": [{"b": 1}], "a.b": [2]}, [], r"^grid\.a\.b: already varied by grid"),
        ({"a.b": [2], "a": [{"c": 1}, {"b": 1}]}, [], r"^grid\.a: varies a\.b, already varied by grid"),
    ],
)
def test_axes_that_make_no_grid_are_refused(grid, zips, message):
    with pytest.raises(ConfigError, match=message):
        build_axes(grid, zips)


def test_an_option_of_every_choice_may_be_an_axis_of_its_own():
    axes = build_axes({"a": [{"name": "x"}, {"name": "y"}], "a.rank": [1, 2]}, [])
    assert [len(axis) for axis in axes] == [2, 2]


def test_fixing_an_axis_picks_the_rows_that_agree():
    assert fix([{"a": 1}, {"a": 2}], "a", 2) == [{"a": 2}]
    assert fix([{"a": 1, "b": 5}, {"a": 2, "b": 6}], "a", 2) == [{"a": 2, "b": 6}]
    assert fix(GATES, "model.gate.name", "none") == [GATES[1]]
    assert fix(GATES, "model.gate", {"name": "none"}) == [GATES[1]]


def test_fixing_an_axis_to_a_value_that_is_not_on_it_puts_it_there_once():
    assert fix([{"a": 1}, {"a": 2}], "a", 3) == [{"a": 3}]
    assert fix(GATES, "model.gate.name", "fixed_decay") == [{"model.gate": {"name": "fixed_decay"}}]
    assert fix([{"m.gate.name": "x"}, {"m.gate.name": "y"}], "m.gate", {"name": "z"}) == [{"m.gate.name": "z"}]


def test_a_key_that_touches_no_axis_leaves_it_whole():
    assert fix(GATES, "model.heads", 4) == GATES
    heads = [{"model.heads": 2}, {"model.heads": 4}]
    assert fix(heads, "model.gate", {"name": "none"}) == heads


@pytest.mark.parametrize(
    ("condition", "agrees"),
    [
        ({"model.gate.name": "x"}, True),
        ({"model.gate": {"name": "x"}}, True),
        ({"model.gate": {"name": "x", "rank": 3}}, False),
        ({"model.gate.name": "x", "model.heads": 2}, True),
        ({"model.gate.name": "x", "model.heads": 4}, False),
        ({"model.nothing": 1}, False),
    ],
)
def test_a_condition_agrees_when_every_key_does(condition, agrees):
    assert matches({"model": {"heads": 2, "gate": {"name": "x", "rank": 2}}}, condition) is agrees


def test_a_point_is_spelled_as_a_user_writes_it():
    assert spell({"g": {"name": "x", "on": True}, "h": [1, None]}) == "g={name: x, on: true}, h=[1, null]"
