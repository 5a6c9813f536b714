"""The hub isn't asked for anything here: `load_dataset` reads folders in the hub's layout by the same code."""

import multiprocessing
from pathlib import Path

import pandas
import pytest

from gla_ablate.data import build_source, check_data
from gla_ablate.errors import ConfigError

CARD = """---
configs:
- config_name: first
  data_files:
  - {split: train, path: first/train-*.parquet}
  - {split: validation, path: first/validation-*.parquet}
- config_name: second
  data_files:
  - {split: train, path: second/train-*.parquet}
---
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two subsets; the first has two shards and a validation split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "repository"
    for subset in ("first", "second"):
        (folder / subset).mkdir(parents=True)
        for shard in range(2):
            texts = [f"{subset} {shard} {i} é" for i in range(100)]
            frame = pandas.DataFrame({"text": texts, "body": texts, "size": range(100)})
            frame.to_parquet(folder / subset / f"train-0000{shard}-of-00002.parquet")
    held_out = pandas.DataFrame({"text": ["held out", None, ""] * 10, "body": ["b"] * 30, "size": range(30)})
    held_out.to_parquet(folder / "first" / "validation-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def documents(rows) -> list[str]:
    return bytes(t for row in rows for t in row["inputs"].tolist()).decode().split("\0")


def hub_source(folder: Path | str, **options):
    config = {"name": "hub", "path": str(folder), "subset": "first", "seq_len": 1, "batch_size": 1}
    return build_source(check_data({**config, **options}))


def test_rows_become_documents_in_their_order(repository):
    source = hub_source(repository, val_split="validation")
    assert documents(source.train) == [f"first {shard} {i} é" for shard in range(2) for i in range(100)]
    assert documents(source.val) == ["held out"] * 10  # nulls and empty texts leave no trace
    assert source.stamp()["documents"] == 210


def test_without_a_validation_split_rows_are_held_out(repository):
    source = hub_source(repository, subset="second", val_fraction=0.2)
    train, val = documents(source.train), documents(source.val)
    assert sorted(train + val) == sorted(f"second {shard} {i} é" for shard in range(2) for i in range(100))
    assert 20 <= len(val) <= 60


def test_subset_split_and_column_decide_what_is_read(repository):
    stamps = [
        hub_source(repository, **options).stamp()["sha256"]
        for options in (
            {},
            {"subset": "second"},
            {"split": "train[:50%]"},
            {"val_split": "validation"},
            {"column": "body"},
        )
    ]
    assert len(set(stamps[:4])) == 4
    assert stamps[4] == stamps[0]  # the same text under another name


def test_changed_data_are_read_anew(repository):
    before = hub_source(repository, subset="second").stamp()
    frame = pandas.DataFrame({"text": ["new text"] * 50, "body": ["b"] * 50, "size": range(50)})
    frame.to_parquet(repository / "second" / "train-00000-of-00002.parquet")
    assert hub_source(repository, subset="second").stamp()["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "texts"}, r"data\.column.*'texts'.*did you mean 'text'.*valid: .*body"),
        ({"column": "size"}, r"data\.column.*'size'"),
        ({"subset": "third"}, r"data\.path.*'third'"),
        ({"split": "trian"}, r"data\.path.*'trian'"),
        ({"val_split": "test"}, r"data\.path.*'test'"),
        ({"path": "/no/such/folder"}, r"data\.path.*/no/such/folder"),
    ],
)
def test_what_the_data_set_does_not_have_is_named(repository, options, message):
    source = hub_source(repository, **options)
    with pytest.raises(ConfigError, match=message):
        source.prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, r"data\.path.*needs it"), ({"path": "x/y", "val_fraction": 0}, r"data\.val_fraction")],
)
def test_wrong_options_name_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        check_data({"name": "hub", **options})


def prepare_unknown(queue) -> None:
    try:
        hub_source("nobody/nothing-of-this-name").prepare()
    except ConfigError as error:
        queue.put(str(error))


def test_offline_a_data_set_that_was_never_fetched_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when datasets is imported, so in a process of its own
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=prepare_unknown, args=(queue,))
    process.start()
    message = queue.get(timeout=120)
    process.join()
    assert "data.path" in message and "nobody/nothing-of-this-name" in message


def test_checking_asks_nobody():
    assert "path" in check_data({"name": "hub", "path": "nobody/nothing"})
