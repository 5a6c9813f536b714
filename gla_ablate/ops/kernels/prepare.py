"""Gates on channels: q and k with the decay to their tile's borders multiplied in, once, for every later kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import LOG2E, channel_decay, locate


@triton.jit(do_not_specialize=["T", "NT"])
def prepare_kernel(
    q, k, g, qg, kg, total, cu_seqlens, tiles, scale, T, NT,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """qg = scale · q · exp(prefix), kg = k · exp(suffix) `[B, T, H, K]`; total `[tiles, H, K]`: log2 decay over each
    tile.

    Both exponents are ≤ 0: nothing overflows, and what underflows is nothing. Grid: tiles · H · K/BK.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k, i_h, i_t = pid % NK, (pid // NK) % H, pid // (NK * H)
    _, i_s, first, length = locate(i_t, cu_seqlens, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    o_t = i_s * BT + tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m = (o_t < length)[:, None] & (o_k < K)[None, :]
    p = ((first + o_t[:, None]) * H + i_h) * K + o_k[None, :]
    prefix, suffix = channel_decay(g, first, i_s, length, i_h, o_k, BT, -float("inf"), H, K, BT)
    b_q = tl.load(q + p, mask=m, other=0.0).to(tl.float32)
    b_k = tl.load(k + p, mask=m, other=0.0).to(tl.float32)
    tl.store(qg + p, (b_q * scale * tl.exp2(prefix)).to(qg.dtype.element_ty), mask=m)
    tl.store(kg + p, (b_k * tl.exp2(suffix)).to(kg.dtype.element_ty), mask=m)
    b_total = tl.sum(tl.load(g + p, mask=m, other=0.0) * LOG2E, axis=0)
    tl.store(total + (i_t.to(tl.int64) * H + i_h) * K + o_k, b_total, mask=o_k < K)
