"""The forms of gated linear attention against each other, forward, as sequences grow: what each form costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from rivals import reason
from shapes import Shape, inputs
from table import header, line, number, save
from torch import Tensor

from gla_ablate.ops import gated_linear_attention, reference

COLUMNS = ("form", "T", "error of o", "forward ms", "peak MiB")
MEMORY, SECONDS = 2**33, 20.0  # where a form stops
COPIES = 4  # of the parallel form's B·H·T²·K numbers live at a time: exponents, decays, products, what is summed


class Form(NamedTuple):
    name: str
    call: Callable[..., tuple[Tensor, Any]]
    power: int  # time grows with T to this power
    dtype: torch.dtype = torch.float32


def forms(K: int, device: str) -> list[Form]:
    scale, backend = K**-0.5, "triton" if device == "cuda" else "torch"

    def op(*given: Tensor) -> tuple[Tensor, Any]:
        return gated_linear_attention(*given, backend=backend)

    found = [
        Form("recurrent", lambda *given: reference.recurrent(*given, scale=scale), 1),
        Form("parallel", lambda *given: reference.parallel(*given, scale=scale), 2),
        Form("chunkwise", lambda *given: reference.chunkwise(*given, scale=scale, chunk=64), 1),
        Form("two-level", lambda *given: reference.two_level(*given, scale=scale, chunk=64, block=16), 1),
        Form(f"op, {backend}, fp32", op, 1),
    ]
    return [*found, Form("op, triton, bf16", op, 1, torch.bfloat16)] if device == "cuda" else found


def run(lengths: list[int], record: dict[str, Any], out: Path | None, deadline: float = float("inf")) -> bool:
    """Print and record a row for each form and length; gates on channels. True if no form was wrong or failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, H, K, V = (1, 4, 128, 128) if device == "cuda" else (1, 2, 16, 16)
    record["size"] = {"B": B, "H": H, "K": K, "V": V}
    print(f"B {B}, H {H}, K {K}, V {V}, gates on channels, forward\n\n{header(COLUMNS)}")
    last: dict[str, tuple[int, float]] = {}  # form → its longest T so far, and ms there
    active, good = forms(K, device), True
    for T in sorted(lengths):
        given = [x.float() for x in inputs(Shape("forms", B, T, H, K, V), "channel", "usual", device)]
        with torch.no_grad():
            want = gated_linear_attention(*(x.double() for x in given), backend="torch")[0]
        for form in list(active):
            row: dict[str, Any] = {"form": form.name, "T": T, "note": excess(form, B * H * K, T, last.get(form.name))}
            if time.monotonic() > deadline:
                row["note"] = "stops: --budget is spent"
            if not row["note"]:
                try:
                    fill(row, form, given, want)
                except Exception as error:  # of any kind: it is the row's result, and the rest goes on
                    row["note"] = f"failed: {reason(error)}"
                good = good and not row["note"]
            if row["note"]:
                active.remove(form)
            last[form.name] = T, row.get("ms", 0.0)
            record["rows"].append(row)
            save(out, record)
            cells = (number(row.get("error"), ".1e"), row["note"] or number(row["ms"], ".3f"))
            print(line([form.name, str(T), *cells, number(row.get("peak_mib"), ".1f")]), flush=True)
    return good


def excess(form: Form, channels: int, T: int, last: tuple[int, float] | None) -> str:
    """Why a form isn't run at T, from what it took at its last length; empty if it is."""
    needed = COPIES * 4 * channels * T**2 if form.power == 2 else 0
    before, ms = last or (T, 0.0)
    seconds = ms * (T / before) ** form.power / 1e3
    if needed > MEMORY:
        return f"stops: needs {needed / 2**30:.0f} GiB"
    return f"stops: needs about {seconds:.0f} s" if seconds > SECONDS else ""


@torch.no_grad()
def fill(row: dict[str, Any], form: Form, given: list[Tensor], want: Tensor) -> None:
    """No time for a wrong result."""
    given = [*(x.to(form.dtype) for x in given[:3]), given[3]]
    o = form.call(*given)[0].double()
    row["error"] = ((o - want).norm() / want.norm()).item()
    if not row["error"] <= measure.LIMIT:
        row["note"] = "wrong"
        return
    del o
    peak = measure.peak_bytes(lambda: form.call(*given))
    row["peak_mib"] = None if peak is None else peak / 2**20
    row["ms"] = measure.median_ms(lambda: form.call(*given))
