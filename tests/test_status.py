"""Files of JSON that somebody else may have laid where they are written, or damaged."""

import os

import pytest

from gla_ablate.status import read_json, set_aside, write_json


def test_a_folder_in_the_place_of_a_file_is_set_aside(tmp_path):
    (tmp_path / "status.json").mkdir()
    (tmp_path / "status.json" / "mine").touch()
    write_json(tmp_path / "status.json", {"a": 1})
    assert read_json(tmp_path / "status.json") == {"a": 1}
    assert (tmp_path / "status.json.damaged" / "mine").exists()


@pytest.mark.parametrize("name", ["status.json", f".status.json.{os.getpid()}"], ids=["itself", "unfinished"])
@pytest.mark.parametrize("there", [True, False])
def test_writing_follows_no_link(name, there, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.write_text("precious")
    home = tmp_path / "home"
    home.mkdir()
    (home / name).symlink_to(elsewhere)
    write_json(home / "status.json", {"a": 1})
    assert read_json(home / "status.json") == {"a": 1} and not (home / "status.json").is_symlink()
    assert [file.name for file in home.iterdir()] == ["status.json"]
    assert elsewhere.exists() == there and (not there or elsewhere.read_text() == "precious")


def test_what_cannot_be_written_leaves_nothing_and_keeps_what_was(tmp_path):
    write_json(tmp_path / "status.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "status.json", {"a": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
    assert read_json(tmp_path / "status.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000], ids=range(5))
def test_what_makes_no_sense_is_nothing(content, tmp_path):
    (tmp_path / "status.json").write_bytes(content)
    assert read_json(tmp_path / "status.json") is None
    first = set_aside(tmp_path / "status.json")
    (tmp_path / "status.json").touch()
    assert set_aside(tmp_path / "status.json") != first and first.read_bytes() == content
