"""Reading ahead: a thread reads batch n + 1 and those after it while step n is under way.

A thread, since a batch is little to read, and what takes time in it, page faults and copies, leaves Python's lock:
16 rows of 2048 bytes of text take 0.2 ms from the page cache, and 1.2 ms through a worker process of PyTorch's loader.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gla_ablate.data.source import IGNORED, Rows

AHEAD = 4  # batches that wait to be taken, at most
GRACE = 5.0  # seconds that the end waits for a read under way: one that hangs mustn't hold the trial up
END = object()


class Reader:
    """The batches of `rows` whose numbers `batches` gives, each in `parts` micro-batches, see `micro_batches`; where
    there is a GPU in page-locked memory, from which they are copied to it while it computes.

    Each `iter()` begins anew, and ends the reading before. What `rows` raises is raised when its batch is due.
    """

    def __init__(self, rows: Rows, batches: Iterable[list[int]], parts: int = 1) -> None:
        self.rows, self.batches, self.parts = rows, batches, parts
        self.waited = 0.0  # seconds that batches have been waited for
        self._reading: Generator[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self.parts * len(self.batches)  # type: ignore[arg-type]  # a TypeError where there is no end

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.close()
        self._reading = self._read()
        return self._reading

    def close(self) -> None:
        """End the reading, and its thread."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _read(self) -> Generator[dict[str, Any]]:
        with contextlib.closing(Ahead(prepared(self.rows, self.batches, self.parts), AHEAD)) as ahead:
            while True:
                began = time.perf_counter()
                try:
                    batch = ahead.take()
                finally:
                    self.waited += time.perf_counter() - began
                if batch is END:
                    return
                yield batch


class Ahead:
    """Goes through `items` in a thread of its own, which is up to `count` of them ahead."""

    def __init__(self, items: Iterator[Any], count: int) -> None:
        self._items = items
        self._free = Semaphore(count)
        self._done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._closed = False
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = Thread(target=self._run, args=(device,), name="reading ahead", daemon=True)
        self._thread.start()

    def take(self) -> Any:
        """The next item, waited for if need be; `END` after the last. Raises what came instead of it."""
        item, error = self._done.get()
        self._free.release()
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self._closed = True
        self._free.release()
        self._thread.join(GRACE)

    def _run(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins with the first, where page-locking would make a context
        try:
            while True:
                self._free.acquire()
                if self._closed:
                    return
                item = next(self._items, END)
                self._done.put((item, None))
                if item is END:
                    return
        except BaseException as error:  # of any kind: it is for the one who takes
            self._done.put((None, error))


def prepared(rows: Rows, batches: Iterable[list[int]], parts: int) -> Iterator[dict[str, Any]]:
    pin = torch.cuda.is_available()
    for numbers in batches:
        for batch in micro_batches(rows[numbers], parts):
            yield {name: pinned(x) for name, x in batch.items()} if pin else batch


# In a thread of its own PyTorch would begin another team of threads for the loops of its operators: NumPy's use none.


def micro_batches(batch: dict[str, Tensor], parts: int = 1) -> Iterator[dict[str, Any]]:
    """`batch`, inputs and targets [B,T], in `parts` of B / parts rows. Where some targets don't count, each with

    labelled    the flat indices of its own that do: on a GPU the search would make every step wait for the device
    counted     how many of the whole batch's do
    weight      where it has more or fewer of them than the mean, how many times that, a float: Σ weight · loss / parts
                is the mean over all targets of the batch
    """
    counts = batch["targets"].numpy() != IGNORED  # [B, T]
    rows, total = len(counts) // parts, int(counts.sum())
    for first in range(0, rows * parts, rows):
        part: dict[str, Any] = {
            name: x[first : first + rows] if isinstance(x, Tensor) else x for name, x in batch.items()
        }
        if total < counts.size:
            labelled = np.flatnonzero(counts[first : first + rows])
            part |= {"labelled": torch.from_numpy(labelled), "counted": total}
            if len(labelled) * parts != total:
                part["weight"] = len(labelled) * parts / total
        yield part


def pinned(x: Any) -> Any:
    """A copy of the tensor `x` in page-locked memory; what is none, as it is."""
    if not isinstance(x, Tensor):
        return x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    np.copyto(copy.numpy(), x.numpy())
    return copy
