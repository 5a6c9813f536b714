"""Values, names and numbers as a reader sees them."""

import pytest

from gla_ablate.report.labels import Labels, decimals, short_names, si, signed, value_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"name": "data_dependent", "rank": 16}, "data_dependent rank=16"),
        ({"rank": 16, "name": "data_dependent", "tau": 16.0}, "data_dependent rank=16 tau=16.0"),
        ({"name": "none"}, "none"),
        ({"a": {"b": True, "c": None}}, "a.b=true a.c=null"),
        (["a.txt", "b.txt"], "a.txt,b.txt"),
        ({}, "unchanged"),
        (3e-4, "0.0003"),
        (64, "64"),
        (False, "false"),
    ],
)
def test_a_value_is_written_without_json(value, text):
    assert value_text(value) == text


def test_an_option_is_named_only_where_it_tells_points_of_its_name_apart():
    gates = [
        {"name": "data_dependent", "rank": 16, "tau": 8},
        {"name": "data_dependent", "rank": 4, "tau": 8},
        {"name": "lowrank", "rank": 2},
        {"name": "none"},
    ]
    labels = Labels(["model.gate"], [{"model.gate": gate} for gate in gates])
    assert [labels.point({"model.gate": gate}) for gate in gates] == [
        "data_dependent rank=16",
        "data_dependent rank=4",
        "lowrank",
        "none",
    ]
    assert labels.constants() == ["data_dependent tau=8", "lowrank rank=2"]


def test_an_option_that_only_some_points_state_is_named():
    gates = [{"name": "data_dependent"}, {"name": "data_dependent", "rank": 4}]
    labels = Labels(["model.gate"], [{"model.gate": gate} for gate in gates])
    assert [labels.point({"model.gate": gate}) for gate in gates] == ["data_dependent", "data_dependent rank=4"]


def test_a_factor_with_one_value_is_left_out_of_labels_and_told_once():
    points = [{"model.gate.name": name, "model.heads": 4} for name in ("none", "fixed_decay")]
    labels = Labels(["model.gate.name", "model.heads"], points)
    assert [labels.point(point) for point in points] == ["none", "fixed_decay"]
    assert labels.constants() == ["heads=4"]


def test_labels_of_a_whole_grid_are_distinct():
    gates = [{"name": "a"}, {"name": "a", "rank": 4}, {"name": "b", "rank": 4}]
    points = [{"model.gate": g, "model.heads": h, "optim.lr": lr} for g in gates for h in (1, 2) for lr in (1e-3, 3e-4)]
    labels = Labels(["model.gate", "model.heads", "optim.lr"], points)
    assert len({labels.point(point) for point in points}) == len(points)
    assert labels.point(points[0]) == "a · heads=1 · lr=0.001"


@pytest.mark.parametrize(
    ("factor", "values", "labels"),
    [
        ("model", [{"heads": 2, "dim": 64}, {"heads": 4, "dim": 64}], ["heads=2", "heads=4"]),
        ("model", [{"heads": 2, "gate": {"name": "none"}}, {"heads": 2, "gate": {"name": "a", "rank": 4}}],
         ["none", "a rank=4"]),
        ("model", [{"gate": {"name": "a"}, "mixer": {"name": "b"}}, {"gate": {"name": "b"}, "mixer": {"name": "a"}}],
         ["gate=a mixer=b", "gate=b mixer=a"]),
        ("optim", [{"lr": 1e-3, "weight_decay": 0.1}, {"lr": 2e-3}, {"lr": 2e-3, "weight_decay": 0.1}],
         ["lr=0.001 weight_decay=0.1", "lr=0.002", "lr=0.002 weight_decay=0.1"]),
        ("optim", [{}, {"lr": 2e-3}], ["optim=unchanged", "lr=0.002"]),
        ("model.gate", [{"rank": 4}, {"name": "none"}], ["rank=4", "none"]),
        ("data", [{"name": "mqar", "pairs": 4}, {"name": "mqar", "pairs": 8}, {"name": "stdlib"}],
         ["mqar pairs=4", "mqar pairs=8", "stdlib"]),
    ],
)  # fmt: skip
def test_a_section_as_a_factor_is_named_by_what_varies_in_it(factor, values, labels):
    points = [{factor: value} for value in values]
    named = Labels([factor], points)
    assert [named.point(point) for point in points] == labels


def test_a_part_of_a_point_is_named_by_itself():
    points = [{"model.gate.name": name, "model.heads": heads} for name in ("a", "b") for heads in (2, 4)]
    assert Labels(["model.gate.name", "model.heads"], points).point({"model.heads": 4}) == "heads=4"


def test_headers_are_as_short_as_they_can_be():
    names = short_names(["model.gate.name", "data.name", "model.dim", "probe.dim", "lr"])
    assert list(names.values()) == ["gate", "data", "model.dim", "probe.dim", "lr"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, ""),
        (0.0, "0"),
        (812.25, "812"),
        (41_249.0, "41.2k"),
        (999_600, "1.00M"),
        (1.5e9, "1.50G"),
        (120_000, "120k"),
    ],
)
def test_large_numbers_have_three_significant_digits_and_a_prefix(number, text):
    assert si(number) == text


@pytest.mark.parametrize(
    ("means", "stds", "places"),
    [
        ([2.3456, 1.9], [], 3),  # four significant digits of the largest
        ([2.3456, 1.9], [0.0123, 0.0045, None], 4),  # or two of the usual std
        ([12.5, None], [2.0], 2),
        ([41_200.0], [310.0], 0),
        ([0.997], [None], 4),
        ([2.0], [1e-12], 6),
        ([None], [None], 0),
        ([0.0], [0.0], 0),
    ],
)
def test_a_column_has_as_many_decimals_as_its_numbers_deserve(means, stds, places):
    assert decimals(means, stds) == places


def test_differences_carry_a_sign_unless_they_round_to_zero():
    assert [signed(x, 2) for x in (0.305, -0.3, -0.001, 0.0)] == ["+0.30", "−0.30", "0.00", "0.00"]
