from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
import torch

from gla_ablate.data.reading import AHEAD, Reader, micro_batches
from gla_ablate.data.source import IGNORED, Rows

DELAY = 0.03  # seconds


class Numbers(Rows):
    """Row i holds the number i; reading takes a while, and that of `broken` fails."""

    def __init__(self, delay: float = 0.0, broken: int | None = None) -> None:
        self.delay, self.broken, self.read = delay, broken, list[int]()

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, rows):
        time.sleep(self.delay)
        if self.broken in rows:
            raise OSError(5, f"row {self.broken} can't be read")
        self.read += rows
        x = torch.tensor(rows)[:, None]
        return {"inputs": x, "targets": x}


def numbers(count: int) -> list[list[int]]:
    return [[2 * i, 2 * i + 1] for i in range(count)]


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "reading ahead"}


@pytest.fixture(autouse=True)
def before():
    """The threads that earlier tests left; this one leaves none."""
    there = threads()
    yield there
    assert threads() <= there


def test_batches_come_whole_and_in_order_and_each_pass_begins_anew(before):
    reader = Reader(Numbers(), numbers(20))
    assert len(reader) == 20
    for _ in range(2):
        assert torch.cat([batch["inputs"].flatten() for batch in reader]).tolist() == [*range(40)]
    assert next(iter(reader))["inputs"].tolist() == [[0], [1]]
    assert next(iter(reader))["inputs"].tolist() == [[0], [1]]
    assert len(threads() - before) == 1  # the reading before has ended
    reader.close()


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.95])
def test_the_weighted_means_of_micro_batches_make_the_mean_of_the_batch(parts, rate):
    rng = np.random.default_rng(1)
    targets = torch.from_numpy(rng.integers(1, 100, (6, 20)))
    targets[torch.from_numpy(rng.random((6, 20)) < rate)] = IGNORED
    targets[2] = IGNORED if rate else 7
    own = [*micro_batches({"inputs": targets, "targets": targets}, parts)]
    assert torch.equal(torch.cat([part["inputs"] for part in own]), targets)
    labelled = [part["targets"].flatten()[part.get("labelled", slice(None))] for part in own]
    assert all((x != IGNORED).all() for x in labelled)
    means = [part.get("weight", 1.0) * x.double().mean() for part, x in zip(own, labelled, strict=True) if len(x)]
    torch.testing.assert_close(sum(means) / parts, torch.cat(labelled).double().mean())
    assert all(part["weight"] == 0 for part, x in zip(own, labelled, strict=True) if not len(x))
    assert rate or not any("weight" in part or "labelled" in part for part in own)


def test_a_reader_counts_and_gives_micro_batches():
    reader = Reader(Numbers(), numbers(5), parts=2)
    assert [batch["inputs"].tolist() for batch in reader] == [[[i]] for i in range(10)]
    assert len(reader) == 10


def test_what_has_no_end_has_no_length():
    with pytest.raises(TypeError):
        len(Reader(Numbers(), (batch for batch in numbers(3))))


def test_so_many_are_read_ahead_and_no_more():
    rows = Numbers()
    reader = Reader(rows, numbers(100))
    reading = iter(reader)
    for taken in (1, 2, 3):
        next(reading)
        deadline = time.monotonic() + 10
        while len(rows.read) < 2 * (taken + AHEAD) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(rows.read) == 2 * (taken + AHEAD)
    reader.close()


def test_reading_passes_while_the_batch_before_is_used():
    rows = Numbers(DELAY)
    reader = Reader(rows, numbers(10))
    waited = []
    for taken, _ in enumerate(reader, 1):
        waited.append(reader.waited)
        deadline = time.monotonic() + 60
        while len(rows.read) < min(2 * (taken + 1), 20):  # a step that is longer than reading
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert len(waited) == 10
    assert waited[-1] - waited[0] < 4 * DELAY  # for nine, which took nine times that to read: none but a busy machine's


def test_what_is_slower_than_its_use_is_waited_for():
    began = time.perf_counter()
    reader = Reader(Numbers(DELAY), numbers(10))
    for _ in reader:
        pass
    elapsed = time.perf_counter() - began
    assert elapsed >= 10 * DELAY
    assert 0.7 * elapsed < reader.waited <= elapsed


@pytest.mark.parametrize("broken", [0, 1, 2 * AHEAD, 19])
def test_an_error_comes_with_its_batch_after_those_before_it(broken):
    reader = Reader(Numbers(broken=broken), numbers(10))
    seen = []
    with pytest.raises(OSError, match=f"row {broken} can't be read"):
        seen.extend(batch["inputs"][0].item() for batch in reader)
    assert seen == [*range(0, broken // 2 * 2, 2)]


def test_an_exception_of_the_one_who_uses_them_ends_the_reading():
    reader = Reader(Numbers(), numbers(10**6))
    with pytest.raises(KeyboardInterrupt):
        for _ in reader:
            raise KeyboardInterrupt
    reader.close()
    reader.close()


def test_a_reading_that_nobody_holds_ends():
    next(iter(Reader(Numbers(), numbers(10**6))))
    gc.collect()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_labelled_are_the_targets_that_count_unless_all_do(rate):
    targets = torch.arange(60).reshape(3, 20)
    targets[torch.from_numpy(np.random.default_rng(0).random((3, 20))) < rate] = IGNORED
    (batch,) = micro_batches({"inputs": targets, "targets": targets})
    assert ("labelled" in batch) == (rate > 0)
    assert "weight" not in batch
    if rate:
        assert torch.equal(batch["labelled"], (targets.flatten() != IGNORED).nonzero().flatten())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_batches_lie_in_page_locked_memory():
    class Masked(Numbers):
        def __getitem__(self, rows):
            x = torch.tensor([[3, IGNORED, row] for row in rows])
            return {"inputs": x, "targets": x}

    reader = Reader(Masked(), numbers(3))
    for i, batch in enumerate(reader):
        assert all(x.is_pinned() for x in batch.values() if isinstance(x, torch.Tensor))
        assert batch["inputs"].tolist() == [[3, IGNORED, 2 * i], [3, IGNORED, 2 * i + 1]]
        assert batch["labelled"].tolist() == [0, 2, 3, 5]
