import os
from pathlib import Path

import pytest

from gla_ablate.data import build_source, check_data
from gla_ablate.data.packing import PackedRows
from gla_ablate.errors import ConfigError


def text_source(files, **options):
    return build_source(check_data({"name": "text", "files": files, "seq_len": 4, "batch_size": 1, **options}))


def text_of(rows: PackedRows) -> bytes:
    """All bytes of the rows but the last target, which is the last byte of the stream or beyond the last whole row."""
    return bytes(token for row in rows for token in row["inputs"].tolist())


def test_the_text_comes_back_in_the_order_of_the_paths(write):
    files = [write("b.txt", b"second file."), write("a.txt", b"first file.")]
    val = write("val.txt", b"held out text")
    source = text_source(files, val_files=[val], seq_len=1)
    assert text_of(source.train) == b"first file.\0second file."
    assert text_of(source.val) == b"held out text"


def test_without_val_files_the_end_of_every_file_validates(write):
    files = [write("a.txt", b"a" * 8 + b"A" * 2), write("b.txt", b"b" * 16 + b"B" * 4)]
    source = text_source(files, val_fraction=0.2, seq_len=1)
    assert text_of(source.train) == b"a" * 8 + b"\0" + b"b" * 16
    assert text_of(source.val) == b"AA\0BBBB"


def test_a_file_for_validation_is_never_trained_on(write, tmp_path):
    for name in ("a", "b", "c"):
        write(f"{name}.txt", name.encode() * 40)
    source = text_source([str(tmp_path / "*.txt")], val_files=[str(tmp_path / "b.txt")], seq_len=1)
    assert set(text_of(source.train)) == set(b"a\0c")
    assert set(text_of(source.val)) == set(b"b")


def test_patterns_cross_folders_and_a_file_counts_once(write, tmp_path):
    write("deep/er/a.txt", b"a" * 100)
    source = text_source([str(tmp_path / "**/*.txt"), str(tmp_path / "deep/*/a.txt")])
    assert source.stamp()["documents"] == 2  # its training and its validation part


def test_any_bytes_are_text(write):
    latin = "naïve café ".encode("latin-1") * 20 + bytes(range(1, 256))
    source = text_source([write("latin.txt", latin)], val_files=[write("val.txt", b"\xff\xfe" * 20)], seq_len=1)
    assert text_of(source.train) == latin
    assert text_of(source.val) == b"\xff\xfe" * 20


def test_empty_files_are_passed_over_and_nul_bytes_dropped(write):
    files = [write("a.txt", b""), write("b.txt", b"left\0right"), write("c.txt", b"\0")]
    source = text_source(files, val_files=[write("val.txt", b"validation")], seq_len=1)
    assert text_of(source.train) == b"leftright"
    assert source.stamp()["documents"] == 2


def test_the_stamp_says_what_was_read_and_not_where(write):
    val = write("val.txt", b"v" * 50)
    stamps = [text_source([write(f"{name}.txt", b"same" * 50)], val_files=[val]).stamp() for name in ("a", "b")]
    assert stamps[0] == stamps[1]
    assert (stamps[0]["name"], stamps[0]["bytes"], stamps[0]["documents"]) == ("text", 250, 2)
    other = text_source([write("c.txt", b"else" * 50)], val_files=[val]).stamp()
    assert other["bytes"] == 250 and other["sha256"] != stamps[0]["sha256"]


def test_the_cache_is_used_again_until_a_file_changes(write, cache, monkeypatch):
    path = write("a.txt", b"before " * 50)
    before = text_source([path]).stamp()
    assert text_source([path], batch_size=2, val_tokens=8).stamp() == before
    entries = [entry for entry in (cache / "data").iterdir() if entry.is_dir()]
    assert len(entries) == 1

    untouched = entries[0].stat().st_mtime_ns
    text_source([path]).prepare()
    assert entries[0].stat().st_mtime_ns == untouched

    state = os.stat(path)
    Path(path).write_bytes(b"after. " * 50)  # as long as before
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    after = text_source([path]).stamp()
    assert after["bytes"] == before["bytes"] and after["sha256"] != before["sha256"]


def test_a_file_may_have_any_name(write):
    path = write("a [1]*?.txt", bytes(range(1, 256)))
    assert text_source([path]).stamp()["bytes"] == 255


@pytest.mark.parametrize("change", [{"val_fraction": 0.3}, {"seq_len": 5}])
def test_options_that_change_the_rows_are_another_cache_entry(write, change):
    path = write("a.txt", bytes(range(1, 256)))
    assert text_of(text_source([path]).train) != text_of(text_source([path], **change).train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": ["nothing-*.txt"]}, r"data\.files\[0\].*nothing-\*\.txt.*no file"),
        ({"files": []}, r"data\.files.*at least one file"),
        ({"files": "a.txt"}, r"data\.files.*'a\.txt'.*list\[str\]"),
        ({}, r"data\.files.*needs it"),
        ({"files": ["here.txt", "her.txt"]}, r"data\.files\[1\].*'her\.txt'.*did you mean 'here\.txt'"),
        ({"files": ["here.txt"], "val_files": ["gone.txt"]}, r"data\.val_files\[0\].*gone"),
        ({"files": ["here.txt"], "val_files": ["*.txt"]}, r"data\.files.*val_files"),
        ({"files": ["here.txt"], "val_fraction": 1.0}, r"data\.val_fraction.*1\.0"),
        ({"files": ["here.txt"], "encoding": "utf-8"}, r"data\.encoding.*no such option"),
        ({"files": ["."]}, r"data\.files\[0\]: got '\.', a folder; '\./\*\*' takes its files"),
        ({"files": ["dangling.md"]}, r"data\.files\[0\].*cannot read"),
        ({"files": ["/dev/zero"]}, r"data\.files\[0\].*cannot read"),
    ],
)
def test_wrong_options_name_their_key(write, tmp_path, monkeypatch, options, message):
    write("here.txt", b"text")
    (tmp_path / "dangling.md").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_data({"name": "text", **options})


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (b"", {}),
        (b"short", {"seq_len": 64}),
        (b"x" * 100, {"batch_size": 90}),
        (b"enough " * 9, {"val_fraction": 0.01}),
    ],
)
def test_too_little_text_says_so_before_training(write, content, options):
    source = text_source([write("a.txt", content)], **{"seq_len": 4, "batch_size": 1, **options})
    for _ in range(2):  # from the cache as well
        with pytest.raises(ConfigError, match=r"data\.seq_len.*bytes"):
            source.prepare()


def test_a_file_that_cannot_be_read_is_named(write, monkeypatch):
    path = write("a.txt", b"text " * 50)
    source = text_source([path])
    monkeypatch.setattr(
        Path, "open", lambda self, *args: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ConfigError, match=r"data\.files: cannot read .*a\.txt \(Permission denied\)"):
        source.prepare()
