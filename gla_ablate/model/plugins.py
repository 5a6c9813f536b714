"""A user's own gates: Python files that register them, named under `plugins:` in an experiment."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from gla_ablate.errors import ConfigError
from gla_ablate.model.gates import GATES

_sha256: dict[str, str] = {}  # module name → sha256 of the file it was loaded from


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Import each file once a process, so that the gates that it registers are known by name.

    Raises `ConfigError` that names the file when it is missing, when it raises, or when a gate's name is taken.
    """
    for path in paths:
        file = Path(path).expanduser().resolve()
        # The path is part of the name, so that two files called gates.py don't replace each other.
        module_name = f"gla_ablate_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
        if module_name in _sha256:
            continue
        if not file.is_file():
            raise ConfigError(f"plugins: no such file {str(file)!r}")
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise ConfigError(f"plugins: {str(file)!r} is not a Python file")
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # the file is the user's: it can raise anything
            del sys.modules[module_name]
            raise ConfigError(f"plugins: {str(file)!r} failed to load: {type(error).__name__}: {error}") from error
        _sha256[module_name] = hashlib.sha256(file.read_bytes()).hexdigest()


def plugin_sha256(gate_name: str) -> str | None:
    """The sha256 of the plugin file that a gate came from; None for a built-in gate."""
    return _sha256.get(GATES[gate_name].__module__)
