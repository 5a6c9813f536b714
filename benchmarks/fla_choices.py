"""What flash-linear-attention's tuners chose, in one JSON file, and how they are made to choose it again.

FLA reads stored choices for some of its kernels; others, tuned by Triton alone, try up to 48 candidates whenever they
meet a new width in a new process. Here each tuner is asked and told alike.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import triton
from triton.runtime.autotuner import Autotuner, Config

Choices = dict[tuple[str, str], dict[str, Any]]  # (kernel, key as JSON) → the fields of a Config

_known: Choices = {}
_run = Autotuner.run


def name_of(tuner: Any) -> str:
    return str(tuner.base_fn.__name__)


def key_of(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton tunes for: the arguments that the tuner names, and the dtypes of all tensors."""
    given = {**dict(zip(tuner.arg_names, args, strict=False)), **kwargs}
    own = {name: x for name, x in given.items() if name in tuner.arg_names}
    named = [own[name] for name in tuner.keys if name in own]
    return (*named, *(str(x.dtype) for x in own.values() if hasattr(x, "dtype")))


def recall(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Put the choice that is known for these arguments where the tuner keeps its own. True if there is one."""
    key = key_of(tuner, args, kwargs)
    config = _known.get((name_of(tuner), json.dumps(key)))
    if config:
        tuner.cache[key] = Config(**config)
    return config is not None


def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    recall(tuner, args, kwargs)
    return _run(tuner, *args, **kwargs)


def preset(path: Path) -> None:
    """From now on, what the file knows is chosen. Raises `ValueError` where another Triton chose it."""
    _known.update(load(path))
    Autotuner.run = run


def load(path: Path) -> Choices:
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["triton"] != triton.__version__:
        raise ValueError(f"{path}: chosen with Triton {stored['triton']}, this is {triton.__version__}")
    return {(name, json.dumps(key)): config for name, found in stored["choices"].items() for key, config in found}


def chosen() -> Choices:
    """By every tuner of this process."""
    found: Choices = {}
    for tuner in (x for x in gc.get_objects() if issubclass(type(x), Autotuner)):
        for key, config in tuner.cache.items():
            if key:
                found[name_of(tuner), json.dumps(key)] = {
                    name: x for name, x in vars(config).items() if name != "pre_hook" and x is not None
                }
    return found


def store(path: Path, device: str) -> None:
    """What the file knows, and what this process has chosen."""
    known = (load(path) if path.exists() else {}) | chosen()
    choices: dict[str, list[Any]] = {}
    for (name, key), config in sorted(known.items()):
        choices.setdefault(name, []).append([json.loads(key), config])
    kernels = [
        f"{json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, found)) + "\n]" for name, found in choices.items()
    ]
    head = f'"device": {json.dumps(device)}, "triton": {json.dumps(triton.__version__)}, "choices": '
    path.write_text("{" + head + "{\n" + ",\n".join(kernels) + "\n}}\n", encoding="utf-8")
