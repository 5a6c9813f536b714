"""Gates without channels: scores of each tile with itself, A = scale · q kᵀ under the decay between the two rows."""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import NONE, TOKEN, head_matrix, keep_row_decay, locate

_NONE = tl.constexpr(NONE)
_TOKEN = tl.constexpr(TOKEN)


@triton.jit(do_not_specialize=["T", "NT"])
def scores_kernel(
    q, k, g, decay, scores, tiles, scale, T, NT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
    VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores `[tiles, HQ, BT, BT]`, zero above the diagonal and past a sequence's end; for gates a token decay
    `[tiles, H, 2, BT]`, fp32, as `kept_row_decay` takes it. Grid: tiles · HQ."""
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q, i_t = pid % HQ, pid // HQ
    i_h = i_q // GROUP
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    if i_s * BT >= length:
        return
    if GATE == _TOKEN:  # noqa: SIM102 (known when compiled, which the next isn't)
        if i_q % GROUP == 0:
            keep_row_decay(g, decay, i_t, first, i_s, length, i_h, H, BT, GATE)
    o_i = tl.arange(0, BT)
    m_t = i_s * BT + o_i < length
    row_q = ((first + i_s * BT + o_i) * HQ + i_q) * K
    row_k = ((first + i_s * BT + o_i) * H + i_h) * K
    acc = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m = m_t[:, None] & (o_k < K)[None, :]
        b_q = tl.load(q + (row_q[:, None] + o_k[None, :]), mask=m, other=0.0).to(DTYPE)
        b_k = tl.load(k + (row_k[:, None] + o_k[None, :]), mask=m, other=0.0).to(DTYPE)
        acc = tl.dot(b_q, tl.trans(b_k), acc, input_precision=PRECISION)
    acc *= scale
    if GATE != _NONE:
        acc *= tl.exp2(head_matrix(g, first, i_s, length, i_h, H, BT, GATE, False))
    acc = tl.where(o_i[:, None] >= o_i[None, :], acc, 0.0)
    tile = i_t.to(tl.int64) * HQ + i_q
    tl.store(scores + tile * BT * BT + o_i[:, None] * BT + o_i[None, :], acc.to(scores.dtype.element_ty))
