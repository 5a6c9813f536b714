import hashlib
import pickle

import datasets
import numpy as np
import pytest
import torch

from gla_ablate.data import packing
from gla_ablate.data.packing import PackedRows, hashed_to_validation, pack, row_count


def stream_of(rows: PackedRows) -> bytes:
    """The text that rows were cut from, up to the last whole row."""
    inputs = bytes(token for row in rows for token in row["inputs"].tolist())
    return inputs + bytes([int(rows[len(rows) - 1]["targets"][-1])])


def test_documents_become_overlapping_rows(tmp_path):
    packed = pack([[b"abc"], [b"de"]], tmp_path / "rows.arrow", seq_len=2)
    rows = PackedRows(tmp_path / "rows.arrow")
    assert (packed.documents, packed.tokens) == (2, 7)
    assert packed.sha256 == hashlib.sha256(b"abc\0de\0").hexdigest()
    assert [bytes(row["inputs"].tolist()) for row in rows] == [b"ab", b"c\0", b"de"]
    assert [bytes(row["targets"].tolist()) for row in rows] == [b"bc", b"\0d", b"e\0"]


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_the_stream_comes_back_whatever_the_block(tmp_path, monkeypatch, seq_len, block):
    monkeypatch.setattr(packing, "BLOCK", block)
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 256, size=size, dtype=np.uint8).tobytes() for size in rng.integers(1, 900, size=14)]
    packed = pack(([d[:100], d[100:]] for d in documents), tmp_path / "rows.arrow", seq_len)
    stream = b"".join(d + b"\0" for d in documents)
    rows = PackedRows(tmp_path / "rows.arrow")
    assert packed.tokens == len(stream)
    assert len(rows) == row_count(len(stream), seq_len) == (len(stream) - 1) // seq_len
    assert stream_of(rows) == stream[: len(rows) * seq_len + 1]


def test_a_document_without_text_leaves_no_trace_and_nul_bytes_are_dropped(tmp_path):
    packed = pack([[], [b""], [b"a\0b", b"\0", b"c"], [b"\0\0"]], tmp_path / "rows.arrow", seq_len=1)
    assert (packed.documents, packed.tokens) == (1, 4)
    assert stream_of(PackedRows(tmp_path / "rows.arrow")) == b"abc\0"


def test_targets_are_the_inputs_one_step_later_and_int64(tmp_path):
    pack([[bytes(range(1, 200))]], tmp_path / "rows.arrow", seq_len=16)
    batch = PackedRows(tmp_path / "rows.arrow")[[3, 0, 7]]
    assert batch["inputs"].shape == batch["targets"].shape == (3, 16)
    assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
    assert torch.equal(batch["targets"], batch["inputs"] + 1)
    assert batch["inputs"].is_contiguous() and batch["targets"].is_contiguous()


def test_a_batch_is_its_rows_stacked(tmp_path):
    pack([[bytes(range(1, 200))]], tmp_path / "rows.arrow", seq_len=16)
    rows = PackedRows(tmp_path / "rows.arrow")
    for key in ("inputs", "targets"):
        assert torch.equal(rows[[5, 2]][key], torch.stack([rows[5][key], rows[2][key]]))


def test_limited_rows_are_spread_over_the_file(tmp_path):
    pack([[bytes(range(1, 202))]], tmp_path / "rows.arrow", seq_len=2)
    rows = PackedRows(tmp_path / "rows.arrow", limit=4)
    assert [int(rows[i]["inputs"][0]) for i in range(len(rows))] == [1, 51, 101, 151]
    assert torch.equal(rows[[1, 3]]["inputs"][:, 0], torch.tensor([51, 151]))
    assert len(PackedRows(tmp_path / "rows.arrow", limit=1000)) == 100


def test_rows_are_mapped_from_the_file_and_not_held_or_pickled(tmp_path):
    pack([[b"some text " * 100_000]], tmp_path / "rows.arrow", seq_len=64)
    rows = PackedRows(tmp_path / "rows.arrow")
    assert rows._table.cache_files == [{"filename": str(tmp_path / "rows.arrow")}]
    assert isinstance(rows._table.data, datasets.table.MemoryMappedTable)
    assert len(pickle.dumps(rows)) < 10_000


def test_about_the_wanted_share_of_names_goes_to_validation_and_always_the_same():
    names = [f"folder/file{i}.py" for i in range(10_000)]
    chosen = [name for name in names if hashed_to_validation(name, 0.1)]
    assert 900 < len(chosen) < 1100
    assert chosen[:3] == ["folder/file6.py", "folder/file20.py", "folder/file31.py"]  # on any machine
    assert set(chosen) < {name for name in names if hashed_to_validation(name, 0.2)}
