import multiprocessing
import time
from pathlib import Path

import pytest

from gla_ablate.data.cache import cache_folder, prepared
from gla_ablate.errors import ConfigError


def slow_write(folder: Path) -> None:
    with (folder.parent / "writes").open("a") as log:
        log.write("x")
    (folder / "first").write_text("1")
    time.sleep(0.5)
    (folder / "second").write_text("2")


def ask(results: "multiprocessing.Queue[list[str]]") -> None:
    results.put(sorted(path.name for path in prepared("corpus", {"key": 1}, slow_write).iterdir()))


def test_one_of_several_processes_prepares_and_all_see_the_whole(cache):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=ask, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert seen == [["first", "second"]] * 3
    assert (cache / "data" / "writes").read_text() == "x"


def test_another_identity_is_another_folder(cache):
    folders = {prepared("corpus", identity, lambda folder: None) for identity in ([1, "a"], [1, "b"], [2, "a"])}
    assert len(folders) == 3


def test_a_preparation_that_failed_or_was_killed_is_started_again(cache):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("…")
        raise RuntimeError("stopped halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        prepared("corpus", 1, fail)
    folder = prepared("corpus", 1, lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GLA_ABLATE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("GLA_ABLATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "gla_ablate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "gla_ablate"


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLA_ABLATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"GLA_ABLATE_CACHE.*file"):
        prepared("corpus", 1, lambda folder: None)
