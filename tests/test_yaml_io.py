from pathlib import Path

import pytest

from gla_ablate.errors import ConfigError
from gla_ablate.yaml_io import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("1e-3", 1e-3),
        ("6E4", 6e4),
        ("-.5", -0.5),
        ("-12", -12),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_are_read_as_they_are_meant(text, value):
    read = parse_yaml(text)
    assert read == value and type(read) is type(value)


def test_anchors_and_merge_keys_work():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1\nb: 2", "2:2: "),
        ("a: 1\n\tb: 2", "2:1: "),
        ("a: 1\na: 2", "2:1: key 'a' stands twice"),
        ("x:\n  a: 1\n  a: 2", "3:3: key 'a' stands twice"),
        ("a: {b: 1, b: 2}", "1:11: key 'b' stands twice"),
        ("? [a]\n: 1", "1:3: "),
        ("a: *nowhere", "1:4: "),
        ("a: !!python/name:os.system x", "1:4: "),
        ("a: 1\n---\nb: 2", "2:1: "),
        ("x: &a {y: *a}", "1:4: "),
        ("a: !!int x", " invalid literal"),
        ('a: !!int ""', " string index"),
        ("a: !!set [1]", " cannot unpack"),
        ('a: "\\UFFFFFFFF"', " Python int too large"),
        ("a: 1\nb: \x00", "2:4: "),
    ],
)
def test_a_syntax_error_is_told_with_its_place(text, place, tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(file)
    assert str(error.value).startswith(f"{file}:{place}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b", "", "just text", "3"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="takes a mapping"):
        read_yaml(file)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(byte 9\)"):
        read_yaml(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "gating.yaml").touch()
    with pytest.raises(ConfigError, match=r"gatign\.yaml: no such file, did you mean 'gating\.yaml'\?"):
        read_yaml(tmp_path / "gatign.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file$"):
        read_yaml(tmp_path / "nowhere" / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        read_yaml(tmp_path)
