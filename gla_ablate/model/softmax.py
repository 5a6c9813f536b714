"""Softmax attention: the mixer of the paper's Transformer++ baseline (arXiv 2312.06635, section 5.1; Llama's layer).

    q, k, v = x W_q, x W_k, x W_v          q and k with rotary positions
    o       = softmax(D^-1/2 q kᵀ + mask) v          per head, causal; D = dim / heads
    y       = o W_o

With a window of W, a token sees itself and the W − 1 tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gla_ablate.config import ModelConfig
from gla_ablate.model.kinds import softmax_heads
from gla_ablate.model.rotary import rotate, rotations

SMALLEST_BLOCK = 64  # rows of a product: narrower windows share one


@dataclass
class SoftmaxCache:
    """The keys, turned already, and values of the latest tokens. Token p lies in slot p mod slots."""

    k: Tensor  # [B, heads, slots, D]
    v: Tensor  # [B, heads, slots, D]
    position: int = 0  # tokens seen


class SoftmaxMixer(nn.Module):
    """x [B,T,dim] → [B,T,dim], causal."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.window = softmax_heads(config), config.window
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)

    def new_cache(self, batch: int, length: int) -> SoftmaxCache:
        """Empty, for sequences of up to `length` tokens, or of any length where the window isn't longer than that. On
        the device of the weights, in their dtype or in autocast's."""
        slots = length if self.window is None else min(length, self.window)
        weight = self.k_proj.weight
        shape = batch, self.heads, slots, weight.shape[0] // self.heads
        k, v = (weight.new_zeros(shape, dtype=activation_dtype(weight)) for _ in range(2))
        return SoftmaxCache(k, v)

    def forward(self, x: Tensor, cache: SoftmaxCache | None = None) -> Tensor:
        """With a `cache`, x goes on from the tokens in it and joins them; under `torch.no_grad()`. Raises `ValueError`
        where they are more than it holds."""
        x = cast_once(x, self.q_proj.weight)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # [B, T, H, D]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1))  # [B, T, H, D]
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))  # [B, T, H, D]
        turn = rotations(0 if cache is None else cache.position, q)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, *turn), rotate(k, *turn), v))  # [B, H, T, D]
        o = attend(q, k, v, self.window) if cache is None else attend_on(q, k, v, self.window, cache)
        return self.out_proj(o.transpose(1, 2).flatten(-2))


def activation_dtype(weight: Tensor) -> torch.dtype:
    """In which a projection with that weight gives its output: autocast leaves fp64 alone."""
    kind = weight.device.type
    cast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else weight.dtype


def cast_once(x: Tensor, weight: Tensor) -> Tensor:
    """x as the projections will have it, for all of them that read it, in decoding and validation. Else autocast casts
    it for each, and in training that is better: their gradients are summed in the dtype of x."""
    return x if torch.is_grad_enabled() else x.to(activation_dtype(weight))


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention; q, k, v and o [B,H,T,D].

    With a window below T, in blocks of C ≥ window rows, each against its own keys and those of the block before, under
    one mask [C,2C]: memory and time go with T · C, and nothing is T×T.
    """
    T = q.shape[2]
    if window is None or window >= T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    C = min(max(window, SMALLEST_BLOCK), T)
    distance = torch.arange(C, device=q.device)[:, None] + C - torch.arange(2 * C, device=q.device)  # [C, 2C]
    mask = (distance >= 0) & (distance < window)
    first = F.scaled_dot_product_attention(q[:, :, :C], k[:, :, :C], v[:, :, :C], attn_mask=mask[:, C:])
    if C == T:
        return first
    N = -(-T // C)  # blocks; the padding of the last is seen by padding alone
    q, k, v = (F.pad(x, (0, 0, 0, N * C - T)) for x in (q, k, v))
    rest = q[:, :, C:].unflatten(2, (N - 1, C)).flatten(1, 2)  # [B, H·(N−1), C, D]
    k, v = (x.unfold(2, 2 * C, C).mT.flatten(1, 2) for x in (k, v))  # [B, H·(N−1), 2C, D]
    o = F.scaled_dot_product_attention(rest, k, v, attn_mask=mask)
    return torch.cat([first, o.unflatten(1, (-1, N - 1)).flatten(2, 3)], 2)[:, :, :T]


def attend_on(q: Tensor, k: Tensor, v: Tensor, window: int | None, cache: SoftmaxCache) -> Tensor:
    """`attend` of T more tokens [B,H,T,D], which join the cache. A prompt costs what it does in training, a token one
    look at the cache, and more tokens after others a product with all that they see."""
    T, slots, start = q.shape[2], cache.k.shape[2], cache.position
    if start + T > slots and slots != window:
        raise ValueError(f"cache: made for {slots} tokens, has {start} and got {T} more; takes new_cache with a length")
    kept = min(start, slots)
    if T == 1:  # its slot is that of the token that leaves the window; in which order the others lie doesn't matter
        store(k, v, cache)
        k, v = (x[:, :, : kept + 1].to(q.dtype) for x in (cache.k, cache.v))
        return F.scaled_dot_product_attention(q, k, v)
    if start == 0:
        o = attend(q, k, v, window)
    else:
        order = torch.arange(start - kept, start, device=q.device) % slots
        all_k, all_v = (torch.cat([x[:, :, order].to(q.dtype), y], 2) for x, y in ((cache.k, k), (cache.v, v)))
        if window is None or kept + T <= window:
            from torch.nn.attention.bias import causal_lower_right  # here, since it loads torch's compiler: a second

            o = F.scaled_dot_product_attention(q, all_k, all_v, attn_mask=causal_lower_right(T, kept + T))
        else:  # rows for the few kept tokens too, so that the blocks are those of `attend`
            o = attend(F.pad(q, (0, 0, kept, 0)), all_k, all_v, window)[:, :, kept:]
    store(k, v, cache)
    return o


def store(k: Tensor, v: Tensor, cache: SoftmaxCache) -> None:
    """Put T more keys and values [B,H,T,D] into the cache, over the oldest."""
    T, slots = k.shape[2], cache.k.shape[2]
    cache.position += T
    new = min(T, slots)
    at = torch.arange(cache.position - new, cache.position, device=k.device) % slots
    for old, x in ((cache.k, k), (cache.v, v)):
        old.index_copy_(2, at, x[:, :, T - new :].to(old.dtype))
