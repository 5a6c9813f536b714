"""SIGINT and SIGTERM as a trial takes them: at once, or as soon as it has saved where it stands."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_alike() -> Iterator[None]:
    """In here SIGTERM raises `KeyboardInterrupt`, as SIGINT does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. Not an `Exception`, so that nothing on the way takes it for an error of the trial."""


class Interruption:
    """What SIGINT and SIGTERM ask for.

    The first raises `Interrupted`, or is `asked` inside of `deferred`, whose code has to `heed` it where that does no
    harm. There a second SIGINT raises, but no second SIGTERM: what stops a whole group of processes sends one, and so
    do the launcher and the launcher's end. Later ones don't disturb the clearing up.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._deferring = False
        self._raised = False

    def install(self) -> None:
        """Handle the signals of this process."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def heed(self, by: str | None = None) -> None:
        """Raise what was asked for; or what was asked of another process, the signal `by`."""
        self.asked = self.asked or by
        if self.asked is not None:
            self._raised = True
            raise Interrupted(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = self.asked is None, self.asked or signal.Signals(number).name
        if not (self._raised or (self._deferring and (first or number == signal.SIGTERM))):
            self.heed()
