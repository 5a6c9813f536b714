"""One token of the recurrence, for decoding: reads and writes every state once, in place."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gla_ablate.ops.kernels.common import CHANNEL, NONE, TOKEN
from gla_ablate.ops.kernels.launching import launch
from gla_ablate.ops.kernels.tuning import pieces, tile

_NONE = tl.constexpr(NONE)
_CHANNEL = tl.constexpr(CHANNEL)

# Strides of batch and head are left general, so that a view into a larger tensor needs no kernel of its own; a stride
# of channels is specialised, since it is 1 nearly always and then costs nothing.
GENERAL = ["q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "g_b", "g_h", "gv_b", "gv_h"]


@triton.jit(do_not_specialize=GENERAL)
def step_kernel(
    q, k, v, g, gv, state, o, scale, q_b, q_h, q_k, k_b, k_h, k_k, v_b, v_h, v_v, g_b, g_h, g_k, gv_b, gv_h, gv_v,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, VALUED: tl.constexpr,
):  # fmt: skip
    """S ← exp(g) S + kᵀ v, o = scale · q S, for BV of the V columns of one head's S `[K, V]`. VALUED: S ← exp(g) S
    exp(gv) + kᵀ v.

    A program holds all K rows of its columns (BK ≥ K), so o needs no sum over programs: no atomics, the same bits every
    time. `state` `[B, H, K, V]` fp32 and `o` `[B, GROUP · H, V]` are contiguous; q, k, v, g, gv come with their strides
    in elements (x_b: batch, x_h: head, x_k, x_v: channel), each in its own dtype, computed with in fp32.
    Grid: B · H · V/BV.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_h, i_b = pid % NV, ((pid // NV) % H).to(tl.int64), (pid // (NV * H)).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    p_s = state + (i_b * H + i_h) * K * V + (o_k[:, None] * V + o_v[None, :])
    b_s = tl.load(p_s, mask=m_s, other=0.0)  # [BK, BV]
    b_k = tl.load(k + i_b * k_b + i_h * k_h + o_k.to(tl.int64) * k_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + i_b * v_b + i_h * v_h + o_v.to(tl.int64) * v_v, mask=m_v, other=0.0).to(tl.float32)
    if GATE == _CHANNEL:
        b_g = tl.load(g + i_b * g_b + i_h * g_h + o_k.to(tl.int64) * g_k, mask=m_k, other=0.0).to(tl.float32)
        b_s *= tl.exp(b_g)[:, None]
    elif GATE != _NONE:
        b_s *= tl.exp(tl.load(g + i_b * g_b + i_h * g_h).to(tl.float32))
    if VALUED:
        b_g = tl.load(gv + i_b * gv_b + i_h * gv_h + o_v.to(tl.int64) * gv_v, mask=m_v, other=0.0).to(tl.float32)
        b_s *= tl.exp(b_g)[None, :]
    b_s += b_k[:, None] * b_v[None, :]
    for j in tl.static_range(GROUP):
        i_q = i_h * GROUP + j
        b_q = tl.load(q + i_b * q_b + i_q * q_h + o_k.to(tl.int64) * q_k, mask=m_k, other=0.0).to(tl.float32)
        b_o = tl.sum((b_q * scale)[:, None] * b_s, axis=0)  # [BV]
        tl.store(o + (i_b * (H * GROUP) + i_q) * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    tl.store(p_s, b_s, mask=m_s)


@cache
def tiles(K: int, V: int) -> tuple[int, int, int]:
    """BK, BV and warps of a program.

    About 4096 numbers of state a program, 32 a thread: 16 KiB of loads in flight at once, in so few registers that
    several programs share an SM. At least 16 columns, so that a row's piece is two of memory's 32-byte sectors. Chosen
    by the compiled kernel's registers on Hopper (no spills up to K = 512), not by time. None of it depends on the
    batch: a server whose batch changes compiles nothing anew.
    """
    bk = tile(K, 512)
    bv = tile(V, min(64, 4096 // bk))
    return bk, bv, max(1, bk * bv // 1024)


def gate(g: Tensor | None) -> tuple[int, int, int, int]:
    """The kind and the strides of batch, head and channel. A fixed gate `[H]` is one a token that no batch moves."""
    if g is None:
        return NONE, 0, 0, 0
    if g.dim() == 1:
        return TOKEN, 0, g.stride(0), 0
    return (TOKEN, *g.stride(), 0) if g.dim() == 2 else (CHANNEL, *g.stride())


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, state: Tensor, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """o `[B, GROUP · H, V]` in `dtype`; arguments as `gla_ablate.ops.step` has checked them. Waits for nothing and
    allocates o alone."""
    B, H, K = k.shape
    V = v.shape[2]
    bk, bv, warps = tiles(K, V)
    q_b, q_h, q_k = q.stride()
    k_b, k_h, k_k = k.stride()
    v_b, v_h, v_v = v.stride()
    kind, g_b, g_h, g_k = gate(g)
    gv_b, gv_h, gv_v = (0, 0, 0) if gv is None else gv.stride()
    o = v.new_empty((B, q.shape[1], V), dtype=dtype)
    with torch.cuda.device_of(q):
        launch(
            step_kernel, B * H * pieces(V, bv), q=q, k=k, v=v, g=g, gv=gv, state=state, o=o, scale=scale,
            q_b=q_b, q_h=q_h, q_k=q_k, k_b=k_b, k_h=k_h, k_k=k_k, v_b=v_b, v_h=v_h, v_v=v_v, g_b=g_b, g_h=g_h, g_k=g_k,
            gv_b=gv_b, gv_h=gv_h, gv_v=gv_v, H=H, GROUP=q.shape[1] // H, K=K, V=V, BK=bk, BV=bv, GATE=kind,
            VALUED=gv is not None, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return o
