"""Triton's interpreter, in three quarters of its time for kernels of many functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_once_a_launch() -> None:
    """Of each kernel, and then of each function that it calls, at each call, the interpreter replaces all functions of
    `triton.language` by its own. Here it does so once a launch for each set of modules that a function sees. What it
    replaces them by is the same; a Triton whose interpreter is made otherwise is left alone."""
    from triton import language as tl
    from triton.runtime import interpreter

    executor, patch = getattr(interpreter, "GridExecutor", None), getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if executor is None or patch is None or scope is None:
        return
    seen: dict[Callable[..., Any], tuple[bool, ...]] = {}
    done: set[tuple[bool, ...]] = set()
    launch = executor.__call__

    def from_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    def patched(fn: Callable[..., Any]) -> Any:
        if fn not in seen:
            known = [id(x) for x in fn.__globals__.values()]
            seen[fn] = tuple(id(module) in known for module in (tl, tl.core))
        if seen[fn] in done:
            return scope()
        done.add(seen[fn])
        return patch(fn)

    executor.__call__, interpreter._patch_lang = from_anew, patched
