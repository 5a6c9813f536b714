"""The one exception that means "the user's configuration is wrong", and the words it is told in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake in an experiment, a config part or the command line: one message, no traceback, exit code 2."""


def nearest(given: str, valid: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the valid name nearest to `given`, or nothing when none is near."""
    near = difflib.get_close_matches(given, list(valid), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""
