"""The op under test and the ops that it stands beside, all called as `op(q, k, v[, g]) -> o` on `[B, T, H, ·]`.

packed   the op itself on packed sequences, cut anywhere; "packed even": as long as they were; "one row": the same
         tokens as one sequence, which is what they cost in a row without `cu_seqlens`
recompute    with nothing kept for the backward but the inputs
fla      flash-linear-attention: `chunk_linear_attn`, `chunk_retention`, `chunk_simple_gla`, `chunk_gla`
flash    softmax attention through PyTorch, FlashAttention backend, causal
cudnn    the same through cuDNN
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gla_ablate.ops import gated_linear_attention

Op = Callable[..., Tensor]

OURS, ONE, EVEN, PACKED, RECOMPUTE = (
    f"gla_ablate{way}" for way in ("", " one row", " packed even", " packed", " recompute")
)
ROWS = (ONE, EVEN, PACKED)  # all tokens in one row of the batch
OWN = (OURS, *ROWS, RECOMPUTE)
RIVALS = ("fla", "flash", "cudnn")
SOFTMAX = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


def load(name: str, kind: str) -> Op:
    """The op of that name for a kind of gate ("softmax" for the two of softmax attention). Imports what it needs, so
    that a first call's time holds compiling and tuning but no imports."""
    if name == "fla":
        return fla(kind)
    if name in SOFTMAX:
        return softmax(SOFTMAX[name])
    if torch.cuda.is_available():
        import gla_ablate.ops.library  # noqa: F401 (for the time that it takes)
    return {OURS: ours, ONE: one_row, EVEN: even, PACKED: packed, RECOMPUTE: frugal}[name]


def ours(*given: Tensor) -> Tensor:
    return gated_linear_attention(*given)[0]


def frugal(*given: Tensor) -> Tensor:
    return gated_linear_attention(*given, recompute=True)[0]


def packed(*given: Tensor) -> Tensor:
    """The op on the same tokens in one row of the batch, as many sequences: the first as long as it was, the others cut
    anywhere, so that nearly all end inside a tile."""
    return in_a_row(offsets, *given)


def even(*given: Tensor) -> Tensor:
    """The same, all as long as they were."""
    return in_a_row(even_offsets, *given)


def one_row(*given: Tensor) -> Tensor:
    """The op on the same tokens as one sequence."""
    return in_a_row(lambda *_: None, *given)


def in_a_row(ends: Callable[[int, int, torch.device], Tensor | None], *given: Tensor) -> Tensor:
    B, T = given[0].shape[:2]
    rows = [x if x.dim() == 1 else x.reshape(1, B * T, *x.shape[2:]) for x in given]
    o, _ = gated_linear_attention(*rows, cu_seqlens=ends(B, T, given[0].device))
    return o.reshape(B, T, *o.shape[2:])


@cache
def even_offsets(B: int, T: int, device: torch.device) -> Tensor:
    return torch.arange(0, B * T + 1, T, device=device)


@cache
def offsets(B: int, T: int, device: torch.device) -> Tensor:
    seed = torch.Generator().manual_seed(0)
    cuts = torch.randint(T, B * T + 1, (max(B - 2, 0),), generator=seed).sort().values
    ends = [torch.tensor([0, T]), cuts, torch.tensor([B * T] if B > 1 else [], dtype=torch.int64)]
    return torch.cat(ends).to(device)


def fla(kind: str) -> Op:
    if kind == "none":
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0]
    if kind == "head":
        from fla.ops.retention import chunk_retention

        return lambda q, k, v, g: chunk_retention(q, k, v)[0]  # has `shapes.fixed_decay` built in
    if kind == "token":
        from fla.ops.simple_gla import chunk_simple_gla

        return lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(q, k, v, g)[0]


def softmax(backend: SDPBackend) -> Op:
    """On `[B, T, H, D]` seen as `[B, H, T, D]`, as a layer would hand it over."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


def missing(name: str) -> str | None:
    """Why a rival can't run here; None if it can."""
    if name == "fla":
        try:
            fla("channel")
        except Exception as error:  # of any kind: FLA's import looks for a GPU and for other packages
            return reason(error)
        return None
    backends = {"flash": torch.backends.cuda.is_flash_attention_available, "cudnn": torch.backends.cudnn.is_available}
    return None if backends[name]() else "not in this build of PyTorch"


def reason(error: BaseException) -> str:
    """An error as one line that fits a table's cell."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text.replace("|", "/")[:120]
