"""Random calls of the op, their fp64 answers, and how far an answer may be off.

Inputs are multiples of 1/64 under 4: exact in bf16, fp16 and fp32 alike, so that one reference serves every dtype.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gla_ablate.ops import gated_linear_attention
from gla_ablate.ops.reference import recurrent

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KINDS = ("none", "head", "token", "channel")
STRENGTHS = ("weak", "usual", "strong", "extreme", "mixed", "resets", "turning")
NAMES = ("o", "state", "dq", "dk", "dv", "d_initial", "dg")

# What the op promises, ‖out − ref‖ / ‖ref‖: (o and state, gradients). Resets: fp32 to 1e-4.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2)}


@dataclass(frozen=True)
class Case:
    kind: str = "channel"
    strength: str = "usual"
    B: int = 1
    T: int = 70
    H: int = 2
    K: int = 24
    V: int = 20
    chunk: int = 64
    group: int = 1  # heads of q for each of the H heads of k, v and g
    lengths: tuple[int, ...] = ()  # of packed sequences
    recompute: bool = False
    bare: bool = False  # no initial state, and the final one isn't asked for, as in training
    values: str = ""  # the strength of a gate on the channels of v; "": there is none

    @property
    def id(self) -> str:
        size = f"B{self.B}T{self.T}H{self.H}K{self.K}V{self.V}C{self.chunk}"
        marks = (
            f"G{self.group}" if self.group > 1 else "",
            "packed" if self.lengths else "",
            "recompute" if self.recompute else "",
            "bare" if self.bare else "",
            f"values-{self.values}" if self.values else "",
        )
        return "-".join(filter(None, (self.kind, self.strength, size, *marks)))


def quantised(*shape: int, seed: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=seed, dtype=torch.float64)
    return ((x * 64).round() / 64).clamp(-3.96875, 3.96875)


def gate(case: Case, seed: torch.Generator) -> Tensor | None:
    """Log decays exact in fp32, as fp64."""
    B, T, H, K = case.B, case.T, case.H, case.K
    if case.kind == "none":
        return None
    shape = {"head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[case.kind]
    usual = torch.nn.functional.logsigmoid(torch.randn(shape, generator=seed, dtype=torch.float64)) / 16
    draw = torch.rand(shape, generator=seed)
    g = {
        "weak": torch.full(shape, -0.01),
        "usual": usual,
        "strong": torch.full(shape, -8.0),
        "extreme": torch.full(shape, -100.0),
        "uneven": torch.where(torch.arange(K) < 16, -0.01, -8.0).expand(B, T, H, K),  # of gates on channels alone
        "mixed": torch.where(draw < 0.5, -1e4, 0.0),
        "resets": torch.where(draw < 0.05, -1e4, usual),
        "turning": usual
        if len(shape) == 1
        else usual * torch.where(torch.arange(T) < T // 2, 1, 99).view(1, T, *(1,) * (len(shape) - 2)),
    }[case.strength]
    return g.float().double()


@functools.lru_cache(maxsize=8)
def inputs(case: Case) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The differentiable inputs and the gradients that come in, fp64."""
    seed = torch.Generator().manual_seed(0)
    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    n = len(case.lengths) or B
    heads = H * case.group
    q, k, v = quantised(B, T, heads, K, seed=seed), quantised(B, T, H, K, seed=seed), quantised(B, T, H, V, seed=seed)
    start, g = quantised(n, H, K, V, seed=seed), gate(case, seed)
    given = {"q": q, "k": k, "v": v, "initial_state": None if case.bare else start, "g": g}
    if case.values:
        given["gv"] = gate(replace(case, kind="channel", strength=case.values, K=V), seed)
    incoming = {"o": quantised(B, T, heads, V, seed=seed), "state": quantised(n, H, K, V, seed=seed)}
    return {name: None if x is None else x.to(DEVICE) for name, x in given.items()}, {
        name: x.to(DEVICE) for name, x in incoming.items()
    }


def leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Inputs that ask for gradients; the gate and the state are fp32 beside 16-bit inputs."""
    wide = torch.float32 if dtype != torch.float64 else dtype
    given, _ = inputs(case)
    return {
        name: None
        if x is None
        else x.to(wide if name in ("g", "gv", "initial_state") else dtype).clone().requires_grad_()
        for name, x in given.items()
    }


def collect(case: Case, o: Tensor, state: Tensor | None, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    _, incoming = inputs(case)
    wanted = {name: x for name, x in given.items() if x is not None}
    loss = (o * incoming["o"].to(o.dtype)).sum()
    found = {"o": o.detach()}
    if not case.bare:
        assert state is not None
        loss += (state * incoming["state"].to(state.dtype)).sum()
        found["state"] = state.detach()
    grads = torch.autograd.grad(loss, list(wanted.values()))
    names = ("d_initial" if name == "initial_state" else f"d{name}" for name in wanted)
    return found | dict(zip(names, grads, strict=True))


@functools.lru_cache(maxsize=8)
def expected(case: Case) -> dict[str, Tensor]:
    """o, the final state and every gradient by the recurrent form in fp64; that of a fixed gate token by token. Grouped
    heads are what repeated ones would be."""
    given = leaves(case, torch.float64)
    if case.kind == "head":
        given["g"] = given["g"].detach().expand(case.B, case.T, -1).clone().requires_grad_()
    q, k, v, g, gv, start = (given.get(name) for name in ("q", "k", "v", "g", "gv", "initial_state"))
    k, v, g, gv = (None if x is None else x.repeat_interleave(case.group, 2) for x in (k, v, g, gv))
    start = None if start is None else start.repeat_interleave(case.group, 1)
    outputs, states, first = [], [], 0
    for i, length in enumerate(case.lengths or (case.T,)):
        rows = slice(first, first + length)
        part = None if g is None else g[:, rows]
        s = start[i : i + 1] if case.lengths and start is not None else start
        side = None if gv is None else gv[:, rows]
        o, s = recurrent(q[:, rows], k[:, rows], v[:, rows], part, gv=side, scale=case.K**-0.5, initial_state=s)
        outputs.append(o)
        states.append(s)
        first += length
    return collect(case, torch.cat(outputs, 1), torch.cat(states)[:, :: case.group], given)


def computed(case: Case, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    given = leaves(case, dtype)
    cu_seqlens = None
    if case.lengths:
        cu_seqlens = torch.tensor([0, *case.lengths], device=DEVICE).cumsum(0)
    q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
    o, state = gated_linear_attention(
        q, k, v, g, gv=given.get("gv"), initial_state=given["initial_state"], output_final_state=not case.bare,
        cu_seqlens=cu_seqlens, chunk_size=case.chunk, backend=backend, recompute=case.recompute,
    )  # fmt: skip
    return collect(case, o, state, given)


def errors(case: Case, got: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors. dg vanishes under strong gates, so it is measured against at least 1e-3 · ‖q ∘ dq‖, and dgv
    against as much of ‖v ∘ dv‖: in 16 bits 2e-2 where there are both, for a step along one axis that decays by more
    than exp(−9) may count as that much to the other. A fixed
    gate's, in which tokens cancel, against the sum of their sizes. The floor of 1e-30 is for gradients that decayed out
    of fp32's range."""
    want = expected(case)
    floor = 2e-2 if case.values and got["o"].dtype.itemsize == 2 else 1e-3
    found = {}
    for name, x in got.items():
        size, right = want[name].norm().item(), want[name]
        if name == "dgv":
            size = max(size, floor * (inputs(case)[0]["v"] * want["dv"]).norm().item())
        if name == "dg":
            size = max(size, floor * (inputs(case)[0]["q"] * want["dq"]).norm().item())
            if case.kind == "head":
                size = max(size, right.abs().sum((0, 1)).norm().item())
                right = right.sum((0, 1))
        found[name] = (x.double() - right).norm().item() / max(size, 1e-30)
        if not x.isfinite().all():
            found[name] = float("nan")
    return found


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    got = computed(case, backend, dtype)
    output_limit, gradient_limit = TOLERANCE[dtype]
    if dtype == torch.float32 and case.strength in ("mixed", "resets"):
        output_limit = gradient_limit = 1e-4
    found = errors(case, got)
    wrong = {
        name: error
        for name, error in found.items()
        if not error <= (output_limit if name in ("o", "state") else gradient_limit)
    }
    assert not wrong, f"{case.id} {backend} {dtype}: {wrong}"
