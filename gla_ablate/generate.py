"""Decoding: tokens that a model adds to a prompt, one after the other.

The prompt passes through the chunkwise kernel, in pieces, so that memory stays bounded however long it is. From then on
a token costs the same time and memory whatever came before it: a layer of gated linear attention carries its state
[H,K,V] and nothing else (arXiv 2312.06635, section 2.1). On a GPU such a step is replayed as a CUDA graph (`replay`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gla_ablate.model import LanguageModel
from gla_ablate.numeric import is_number, is_whole
from gla_ablate.replay import stepper

PIECE = 2**16  # tokens of a prompt at a time, those of all sequences together


def generate(
    model: LanguageModel,
    tokens: Tensor,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """`n` tokens after `tokens` [B,T], T ≥ 1: n times int64 [B], on the model's device.

    Args:
        temperature: divides the logits; 0 takes the most probable token, without chance.
        top_k: draw from the k most probable tokens alone (and those as probable as the last of them).
        top_p: draw from the fewest most probable tokens that together have at least this probability (nucleus sampling,
            arXiv 1904.09751); after `top_k`.
        seed: of what is drawn. The same seed gives the same tokens on the same device; torch's generators are left
            untouched.

    The model should be in eval mode; autocast is the caller's, around the whole iteration. Raises `ValueError` at once
    for an argument that can't be, and with the first token if the prompt's logits aren't finite.
    """
    device = model.embedding.weight.device
    check(tokens, n, temperature, top_k, top_p, seed, model.embedding.num_embeddings)
    random = torch.Generator(device).manual_seed(seed)
    return _generate(model, tokens.to(device), n, temperature, top_k, top_p, random)


def check(
    tokens: Tensor, n: int, temperature: float, top_k: int | None, top_p: float | None, seed: int, vocab_size: int
) -> None:
    """Raises `ValueError` with the argument, what it got and what it takes."""
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens: got {type(tokens).__name__}, takes an int64 tensor [B, T]")
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.dtype != torch.long:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"tokens: got {got}, takes int64 [B, T] with at least one token (byte 0 begins a text)")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"tokens: got token {low if low < 0 else high}, takes 0 to {vocab_size - 1}")
    if not is_whole(n) or n < 0:
        raise ValueError(f"n: got {n!r}, takes a whole number from 0")
    if not (is_number(temperature) and math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature!r}, takes a number from 0 (0: the most probable token)")
    if top_k is not None and not (is_whole(top_k) and top_k >= 1):
        raise ValueError(f"top_k: got {top_k!r}, takes a whole number from 1")
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p: got {top_p!r}, takes a number above 0, to 1")
    if not (is_whole(seed) and 0 <= seed < 2**63):
        raise ValueError(f"seed: got {seed!r}, takes a whole number from 0, below 2^63")


@torch.no_grad()
def _generate(
    model: LanguageModel,
    tokens: Tensor,
    n: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    random: torch.Generator,
) -> Iterator[Tensor]:
    if n == 0:
        return
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + n)
    logits = prefill(model, tokens, cache)
    if not logits.isfinite().all():
        raise ValueError("the logits of the prompt aren't finite: the weights have diverged")
    step = stepper(model, cache)
    for left in reversed(range(n)):
        token = sample(logits, temperature, top_k, top_p, random)
        yield token
        if left:
            logits = step(token)


def prefill(model: LanguageModel, tokens: Tensor, cache: list) -> Tensor:
    """Takes `cache` past `tokens` [B,T]; the logits [B,vocab] after the last one, the only ones that are formed."""
    for piece in tokens.split(max(PIECE // tokens.shape[0], 1), dim=1):
        hidden = model.hidden(piece, cache=cache)[:, -1]
    return model.head(hidden)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, random: torch.Generator
) -> Tensor:
    """One token [B] from logits [B,vocab]. Waits for nothing on the host, so that a GPU isn't held up."""
    if temperature == 0:
        return logits.argmax(-1)
    # fp64: a temperature near 0 then gives the most probable token, where fp32 would divide 0 by 0.
    logits = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        more_probable = p.cumsum(-1) - p
        ordered = ordered.masked_fill(more_probable >= top_p, -math.inf)
        logits = logits.scatter(-1, index, ordered)
    # The largest of logits + Gumbel noise is a draw from their softmax; −log of an exponential is Gumbel's.
    noise = torch.empty_like(logits).exponential_(generator=random)
    return (logits - noise.log()).argmax(-1)
