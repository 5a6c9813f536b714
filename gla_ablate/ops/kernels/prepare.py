"""Gates on channels: q and k with the decay to their tile's borders, and the scores of each tile with itself.

Where the gates of a tile are mild, one anchor in its middle serves all its rows: no exponent leaves the range of fp32,
and a score is exp(d_i) q_i · exp(−d_j) k_j. `prepare_kernel` assumes it of tiles in which `survey_kernel` has seen
nothing else, finds out, and marks the others, which `steep_prepare_kernel` does over.

What the two factors of a score lose in 16 bits would be most of the error of o and dv, so each is in two halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gla_ablate.ops.kernels.common import across, locate, store
from gla_ablate.ops.kernels.decay import (
    gates,
    half_sums,
    is_steep,
    matrix,
    summed,
)
from gla_ablate.ops.kernels.parts import parts, product, turned


@triton.jit
def keep_decay(decay, halves, early, late, tile, o_k, K: tl.constexpr):
    tl.store(decay + tile * K + o_k, early * late, mask=o_k < K)
    tl.store(halves + 2 * tile * K + o_k, early, mask=o_k < K)
    tl.store(halves + (2 * tile + 1) * K + o_k, late, mask=o_k < K)


@triton.jit(do_not_specialize=["T", "NT"])
def prepare_kernel(
    q, k, g, qg, kg, decay, halves, scores, steep, sums, tiles, scale, mild, T, NT,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    STAGES: tl.constexpr, VARLEN: tl.constexpr, DESC: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """qg = scale · q · exp(prefix) `[tiles, HQ, BT, K]`, kg = k · exp(suffix) `[tiles, H, BT, K]`, zero past a
    sequence's end; decay `[tiles, H, K]` and halves `[tiles, H, 2, K]`: what a whole tile and its halves let through;
    scores `[tiles, HQ, BT, BT]` of each tile with itself; steep `[tiles, H]`: whether a half decays by more than
    `mild` (log2), which leaves all to be done over. What `survey_kernel` found steep is left as it is, but for
    grouped heads. Grid: tiles · HQ.

    DESC: q, k, g, qg, kg are tensor descriptors; WHOLE: no sequence ends inside a tile.
    """
    HQ: tl.constexpr = H * GROUP
    pid = tl.program_id(0)
    i_q, i_t = pid % HQ, pid // HQ
    i_h = i_q // GROUP
    i_s, first, length = locate(i_t, tiles, T, NT, VARLEN)
    tile, own = i_t.to(tl.int64) * H + i_h, i_t.to(tl.int64) * HQ + i_q
    # loaded while `locate` loads, not after; in a group another program may be writing it, and the warps of this one
    # must not disagree
    done_over = tl.load(steep + tile) != 0 if GROUP == 1 else False
    if (i_s * BT >= length) | done_over:
        return
    o_i = tl.arange(0, BT)
    left = tl.minimum(length - i_s * BT, BT)
    m_t = o_i < left
    m_i = o_i < BT
    row = first + i_s * BT
    middle = matrix(sums, LEVELS + 3, BT, BT)
    acc = tl.zeros([BT, BT], dtype=tl.float32)
    beyond = 0
    for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        col = i_h * K + i_k * BK
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_g = gates(g, row, col, H * K, m_t, m_k, DESC, WHOLE)
        b_q = across(q, row, i_q * K + i_k * BK, HQ * K, m_t, m_k, DESC, WHOLE)
        b_k = across(k, row, col, H * K, m_t, m_k, DESC, WHOLE)
        early, late = half_sums(b_g)
        beyond = tl.maximum(beyond, is_steep(early, late, mild))
        early, late = tl.exp2(early), tl.exp2(late)
        if i_q % GROUP == 0:  # what a group has in common
            keep_decay(decay, halves, early, late, tile, o_k, K)
        if beyond == 0:
            d = summed(parts(b_g, DTYPE), middle)
            b_e = b_q.to(tl.float32) * scale * tl.exp2(d)
            b_f = b_k.to(tl.float32) * tl.exp2(-d)
            store(qg, tl.trans(b_e * early[:, None]), own * BT, i_k * BK, K, m_i, m_k, DESC)
            if i_q % GROUP == 0:
                store(kg, tl.trans(b_f * late[:, None]), tile * BT, i_k * BK, K, m_i, m_k, DESC)
            acc = product(turned(parts(b_e, DTYPE)), parts(b_f, DTYPE), acc, PRECISION)
    acc = tl.where(o_i[:, None] >= o_i[None, :], acc, 0.0)
    tl.store(scores + own * BT * BT + o_i[:, None] * BT + o_i[None, :], acc.to(scores.dtype.element_ty))
    if i_q % GROUP == 0:
        tl.store(steep + tile, beyond)
