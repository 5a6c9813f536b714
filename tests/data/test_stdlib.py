import time

import pytest

from gla_ablate.data import build_source, check_data, stdlib
from gla_ablate.data.packing import hashed_to_validation


def small_library(tmp_path, monkeypatch, count=60):
    root = tmp_path / "library"
    for index in range(count):
        path = root / ["", "test", "json"][index % 3] / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {index}\n" * 20)
    for installed in ("site-packages", "dist-packages", "__pycache__"):
        (root / installed).mkdir()
        (root / installed / "other.py").write_text("# not the library\n")
    (root / "data.txt").write_text("# not a module\n")
    monkeypatch.setattr(stdlib, "library_root", lambda: root)
    return root


def lines(rows) -> set[bytes]:
    return set(bytes(t for row in rows for t in row["inputs"].tolist()).replace(b"\0", b"").split(b"\n"))


def test_every_module_is_in_exactly_one_split(tmp_path, monkeypatch):
    root = small_library(tmp_path, monkeypatch)
    source = build_source(check_data({"name": "stdlib", "seq_len": 1, "batch_size": 1}))
    train, val = lines(source.train), lines(source.val)
    for index in range(60):
        path = next(root.rglob(f"module{index}.py")).relative_to(root).as_posix()
        line, held_out = f"# module {index}".encode(), hashed_to_validation(path, 0.1)
        assert ((line in train), (line in val)) == (not held_out, held_out)
    assert source.stamp()["documents"] == 60
    assert not any(b"not" in line for line in train | val)


def test_the_split_does_not_depend_on_where_python_lives(tmp_path, monkeypatch):
    stamps = []
    for place in ("usr", "opt"):
        small_library(tmp_path / place, monkeypatch)
        stamps.append(build_source(check_data({"name": "stdlib", "seq_len": 8, "batch_size": 1})).stamp())
    assert stamps[0] == stamps[1]


def test_this_python_s_library_is_prepared_within_seconds():
    config = check_data({"name": "stdlib"})
    source = build_source(config)
    started = time.perf_counter()
    source.prepare()
    assert time.perf_counter() - started < 20  # about 1 s; the rest is for a busy machine
    stamp = source.stamp()
    # Some distributions ship the library without its tests, which are two thirds of it.
    assert stamp["bytes"] > 5_000_000 and stamp["documents"] > 400
    assert 0.03 < stamp["val_tokens"] / (stamp["train_tokens"] + stamp["val_tokens"]) < 0.2
    assert len(source.val) == 256
    assert source.vocab_size == 256 and source.bytes_per_token == 1.0

    again = build_source(config)
    started = time.perf_counter()
    again.prepare()
    assert time.perf_counter() - started < 2
    assert again.stamp() == stamp


@pytest.mark.parametrize("rows", [8, 64])
def test_a_batch_is_read_within_milliseconds(rows):
    source = build_source(check_data({"name": "stdlib", "batch_size": rows}))
    train = source.train
    times = []
    for start in range(20):
        started = time.perf_counter()
        train[[(start * 7919 + 104_729 * i) % len(train) for i in range(rows)]]
        times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 2] < 0.01  # 0.2 and 0.6 ms on an idle core
