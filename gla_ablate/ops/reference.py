r"""The four forms of gated linear attention, in plain PyTorch, each short enough to read beside the paper.

    S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t,    o_t = scale · q_t S_t

Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, g None, `[H]`, `[B, T, H]` or `[B, T, H, K]` (log forget gates ≤ 0),
initial state `[B, H, K, V]`; in the first two also gv `[B, T, H, V]`, the gate on values of the general form,

    S_t = (exp(g_t)ᵀ exp(gv_t)) ∘ S_{t-1} + k_tᵀ v_t.

Every form returns `(o [B, T, H, V], final state [B, H, K, V])` in the dtype of its inputs
and is differentiable; in fp64 they agree to rounding. They are for reading and for tests: `recurrent` is the
definition, `chunkwise` in `gla_ablate.ops.chunkwise` is the one to train with where there is no GPU.

Source: Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635), sections 2 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

Output = tuple[Tensor, Tensor]


def per_channel(g: Tensor | None, k: Tensor) -> Tensor:
    """Any kind of gate as log decay `[B, T, H, K]`: what the reference forms, and only they, compute with."""
    if g is None:
        return torch.zeros_like(k)
    if g.dim() == 1:
        return g[None, None, :, None].expand_as(k)
    return g[..., None].expand_as(k) if g.dim() == 3 else g


def zero_state(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, gv: Tensor | None = None, scale: float,
    initial_state: Tensor | None = None,
) -> Output:  # fmt: skip
    """The definition, one token at a time (section 4.1, equation 3)."""
    decay, value_decay = per_channel(g, k).exp(), (torch.zeros_like(v) if gv is None else gv).exp()
    state, outputs = zero_state(k, v, initial_state), []
    for t in range(q.shape[1]):
        state = (
            decay[:, t, :, :, None] * value_decay[:, t, :, None, :] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        )
        outputs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, gv: Tensor | None = None, scale: float,
    initial_state: Tensor | None = None,
) -> Output:  # fmt: skip
    """All pairs at once (section 4.2, equation 4): P_ij = Σ_c q_ic k_jc exp(b_ic − b_jc) for j ≤ i, b = Σ g to a row.

    The paper's (Q ⊙ B)(K / B)ᵀ divides by a vanishing B; here each pair's exponent is formed first, in log space.
    Takes B·H·T²·K numbers, and as many of V if there is a gate on values, which decays along the other axis of the
    state: exp(b_ic − b_jc) exp(c_iv − c_jv), c = Σ gv.
    """
    b = per_channel(g, k).cumsum(1)
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()[None, :, :, None, None]
    exponent = (b[:, :, None] - b[:, None]).masked_fill(~causal, -torch.inf)  # [B, T, T, H, K]
    scores = torch.einsum("bihc,bjhc,bijhc->bhij", scale * q, k, exponent.exp())
    start = zero_state(k, v, initial_state)
    c = (torch.zeros_like(v) if gv is None else gv).cumsum(1)
    if gv is None:
        o = torch.einsum("bhij,bjhv->bihv", scores, v)
    else:
        exponent = (c[:, :, None] - c[:, None]).masked_fill(~causal, -torch.inf)  # [B, T, T, H, V]
        o = torch.einsum("bhij,bjhv,bijhv->bihv", scores, v, exponent.exp())
    o = o + c.exp() * torch.einsum("bihk,bhkv->bihv", scale * q * b.exp(), start)
    if q.shape[1] == 0:
        return o, start
    written = torch.einsum("bthk,bthv->bhkv", k * (b[:, -1:] - b).exp(), v * (c[:, -1:] - c).exp())
    return o, b[:, -1].exp()[..., None] * c[:, -1].exp()[:, :, None] * start + written


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, scale: float, initial_state: Tensor | None = None, chunk: int
) -> Output:
    """Recurrent between chunks, parallel inside (section 4.3.1): each chunk sees the state at its start."""
    decay = per_channel(g, k)
    state, outputs = zero_state(k, v, initial_state), []
    for s in range(0, q.shape[1], chunk):
        rows = slice(s, s + chunk)
        o, state = parallel(q[:, rows], k[:, rows], v[:, rows], decay[:, rows], scale=scale, initial_state=state)
        outputs.append(o)
    return torch.cat(outputs, 1) if outputs else torch.zeros_like(v), state


def two_level(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    chunk: int,
    block: int,
) -> Output:
    """Secondary chunking (section 4.3.3): a chunk's blocks meet in plain products, the diagonal ones in log space.

    For rows i of block I and columns j of an earlier block of the chunk, the score's decay is cut at the start of I:
    exp(b_i − b_j) = exp(b_i − b_start) · exp(b_start − b_j). Both exponents are ≤ 0, so both factors can be multiplied
    into q and k and the product taken by matrix units in half precision.
    """
    T = q.shape[1]
    decay = per_channel(g, k)
    state, outputs = zero_state(k, v, initial_state), []
    for s in range(0, T, chunk):
        end = min(s + chunk, T)
        b = decay[:, s:end].cumsum(1)
        before = pad(b, (0, 0, 0, 0, 1, 0))  # before[i]: the sum of the gates ahead of row i
        for r in range(s, end, block):
            rows, earlier = slice(r, min(r + block, end)), slice(s, r)
            start = before[:, r - s : r - s + 1]
            into = scale * q[:, rows] * (b[:, r - s : rows.stop - s] - start).exp()
            scores = torch.einsum("bihc,bjhc->bhij", into, k[:, earlier] * (start - b[:, : r - s]).exp())
            o = torch.einsum("bhij,bjhv->bihv", scores, v[:, earlier])
            o = o + torch.einsum("bihk,bhkv->bihv", into * start.exp(), state)
            diagonal, _ = parallel(q[:, rows], k[:, rows], v[:, rows], decay[:, rows], scale=scale)
            outputs.append(o + diagonal)
        to_end = (b[:, -1:] - b).exp()
        state = b[:, -1].exp()[..., None] * state + torch.einsum("bthk,bthv->bhkv", k[:, s:end] * to_end, v[:, s:end])
    return torch.cat(outputs, 1) if outputs else torch.zeros_like(v), state
