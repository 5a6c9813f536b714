r"""The chunkwise form in plain PyTorch, vectorised over chunks and blocks: the `"torch"` backend, for any device.

Numerics, the same as the Triton kernels'. A score needs exp(g_{j+1} + … + g_i). A difference of two running sums loses
the small steps that follow a large one, and anchored factors exp(±sum) overflow, so every exponent here is a sum
*outward* from an anchor between j and i, and each pair of rows meets at exactly one anchor:

* rows of two chunks: at the boundaries of the chunks (`prefix`, `suffix`; both ≤ 0);
* rows of two halves of a 2w-row segment: at its middle, for w = C/2, C/4, …, the block size (both exponents ≤ 0);
* rows of one block: at its centre, as exp(d_i) · exp(−d_j). Here alone an exponent can be positive, so here alone the
  steps are bounded (`BLOCK`): a block's half times the bound stays inside the range of the dtype, and a step that
  decays by more is invisible at its precision.

Backward is autograd's. Because an exponent is a sum outward from its anchor, its gradient is too: dg collects only the
pairs that cross a step, and the textbook's cancelling q·dq − k·dk never appears, but for the few rows of a block. There
the pair (i, i), which no gate touches, is kept out of the products, since it would dominate both terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

# Rows of a block and the bound (nats) of a step inside it: (rows / 2) · |bound| stays under log(largest number).
BLOCK = {torch.float32: (8, -19.0), torch.float64: (8, -170.0)}


def prefix(g: Tensor) -> Tensor:
    """Row i of each segment `[..., w, K]`: g_0 + … + g_i."""
    return g.cumsum(-2)


def suffix(g: Tensor) -> Tensor:
    """Row j of each segment `[..., w, K]`: g_{j+1} + … + g_{w−1}, summed from the end: no subtraction."""
    return pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def inside(d: Tensor) -> tuple[Tensor, Tensor]:
    """exp(d) and exp(−d) of a block's rows `[..., rows, K]`, for what reads and what writes there. 0 for the first row,
    which reads from no other, and the last, to which none writes: theirs are the largest, and might not be finite times
    k or v."""
    o = torch.arange(d.shape[-2], device=d.device)[:, None]
    return d.masked_fill(o == 0, -math.inf).exp(), (-d).masked_fill(o == d.shape[-2] - 1, -math.inf).exp()


def channel_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Scores inside chunks `[..., C, C]` (zero above the diagonal) for gates on channels; q, k, g `[..., C, K]`,
    of which k and g are broadcast."""
    C = q.shape[-2]
    block, bound = BLOCK[g.dtype]
    step = g.clamp(min=bound).unflatten(-2, (C // block, 2, block // 2))
    d = torch.stack((-suffix(step[..., 0, :, :]), prefix(step[..., 1, :, :])), -3).flatten(-3, -2)
    qb, kb = (x.unflatten(-2, (C // block, block)) for x in (q, k))
    reads, writes = inside(d)
    inner = ((qb * reads) @ (kb * writes).mT).tril(-1) + torch.diag_embed((qb * kb).sum(-1))
    scores = inner  # [..., segments, w, w], joined in pairs until one segment is left
    w = block
    while w < C:
        qs, ks, gs = (x.unflatten(-2, (C // (2 * w), 2, w)) for x in (q, k, g))
        upper = qs[..., 1, :, :] * prefix(gs[..., 1, :, :]).exp()
        lower = ks[..., 0, :, :] * suffix(gs[..., 0, :, :]).exp()
        s = scores.unflatten(-3, (C // (2 * w), 2))
        top = pad(s[..., 0, :, :], (0, w))
        scores = torch.cat((top, torch.cat((upper @ lower.mT, s[..., 1, :, :]), -1)), -2)
        w *= 2
    return scores.squeeze(-3)


def head_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Scores inside chunks for one gate a head and token: q, k `[..., C, K]`, g `[..., C]`."""
    C = g.shape[-1]
    after = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    steps = torch.where(after, g[..., :, None], 0.0)  # step t counts for column j < t
    return (q @ k.mT).tril() * steps.cumsum(-2).exp()


def channel_mix(scores: Tensor, v: Tensor, gv: Tensor) -> Tensor:
    """Σ_j scores_ij v_j exp(gv_{j+1} + … + gv_i) inside chunks, `[..., C, V]`, for gates on value channels: what
    `channel_scores` is for keys, with the same anchors. scores `[..., C, C]`; v, gv `[..., C, V]`, broadcast."""
    C = scores.shape[-1]
    block, bound = BLOCK[gv.dtype]
    step = gv.clamp(min=bound).unflatten(-2, (C // block, 2, block // 2))
    d = torch.stack((-suffix(step[..., 0, :, :]), prefix(step[..., 1, :, :])), -3).flatten(-3, -2)
    reads, writes = inside(d)
    inner = squares(scores, block).tril(-1) @ (v.unflatten(-2, (C // block, block)) * writes) * reads
    o = inner.flatten(-3, -2) + scores.diagonal(dim1=-2, dim2=-1)[..., None] * v
    w = block
    while w < C:
        vs, gs = (x.unflatten(-2, (C // (2 * w), 2, w)) for x in (v, gv))
        earlier = vs[..., 0, :, :] * suffix(gs[..., 0, :, :]).exp()
        later = squares(scores, 2 * w)[..., w:, :w] @ earlier * prefix(gs[..., 1, :, :]).exp()
        o = o + torch.stack((torch.zeros_like(later), later), -3).flatten(-4, -2)
        w *= 2
    return o


def squares(x: Tensor, w: int) -> Tensor:
    """The blocks on the diagonal of `[..., C, C]`, `[..., C / w, w, w]`."""
    n = x.shape[-1] // w
    return x.unflatten(-1, (n, w)).unflatten(-3, (n, w)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, initial_state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """`o [B, T, G·H, V]` and the final state `[B, H, K, V]`; q `[B, T, G·H, K]` already scaled, k `[B, T, H, K]`,
    v `[B, T, H, V]`, all tensors fp32 or all fp64.

    `g`: None, `[H]`, `[B, T, H]` or `[B, T, H, K]`; a gate without channels is never widened to K. `gv`: None or
    `[B, T, H, V]`.
    """
    T, H = k.shape[1:3]
    if T == 0:  # of no tokens, but of the inputs' graph, and a state that isn't the caller's own
        o = q[..., :1] * v.repeat_interleave(q.shape[2] // H, 2)
        for x in (k, g, gv):
            o = o if x is None else o + x.sum()
        return o, initial_state + k.sum() * v.sum()
    chunk = min(chunk, max(16, 1 << (T - 1).bit_length()))  # a chunk longer than the sequence is padding only
    n = -(-T // chunk)

    def split(x: Tensor) -> Tensor:
        """[B, T, G·H, ...] → [B, H, G, N, C, ...]; padding neither writes to the state nor decays it."""
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, n * chunk - T))
        return x.view(x.shape[0], n, chunk, H, x.shape[2] // H, *x.shape[3:]).movedim((3, 4), (1, 2))

    qc, kc, vc = split(q).contiguous(), split(k).contiguous(), split(v).contiguous()
    into: Tensor | None = None  # decay from the chunk's start to each row, from each row to the chunk's end, over it
    out: Tensor | None = None
    whole: Tensor | None = None
    if g is not None and g.dim() == 4:
        gc = split(g).contiguous()
        scores = channel_scores(qc, kc, gc)
        into, out, whole = prefix(gc).exp(), suffix(gc).exp(), gc.sum(-2).exp()
    elif g is not None:
        gc = split(g) if g.dim() == 3 else split(g[None, None].expand(1, T, -1))  # [B or 1, H, 1, N, C]
        scores = head_scores(qc, kc, gc)
        column = gc[..., None]
        into, out, whole = prefix(column).exp(), suffix(column).exp(), gc.sum(-1, keepdim=True).exp()
    else:
        scores = (qc @ kc.mT).tril()
    sc = None if gv is None else split(gv).contiguous()
    kept = None if sc is None else sc.sum(-2).exp()
    # what each chunk writes, [B, H, 1, N, K, V]
    added = (kc if out is None else kc * out).mT @ (vc if sc is None else vc * suffix(sc).exp())
    states, state = [], initial_state
    for i in range(n):
        states.append(state)
        state = state if whole is None else whole[:, :, 0, i, :, None] * state
        state = (state if kept is None else kept[:, :, 0, i, None, :] * state) + added[:, :, 0, i]
    o = (qc if into is None else qc * into) @ torch.stack(states, 2)[:, :, None]
    o = scores @ vc + o if sc is None else channel_mix(scores, vc, sc) + prefix(sc).exp() * o
    return o.movedim((1, 2), (3, 4)).flatten(3, 4).flatten(1, 2)[:, :T], state
