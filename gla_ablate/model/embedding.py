"""The look-up of tokens' vectors, with a gradient that has the same bits in every run.

PyTorch adds up the gradients of a small vocabulary's rows on a GPU in the order in which they arrive (256 rows of
16,384 tokens on an H200: six runs, six results), so that two runs of one seed part after their first step. Its way for
`torch.use_deterministic_algorithms` sorts them first, and takes 0.05 to 0.4 ms longer, launches included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """`nn.Embedding`, without its options for the gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """Tokens `[...]` → `[..., dim]`."""
        looked_up: Tensor = _LookUp.apply(input, self.weight)
        return looked_up


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.gla_ablate.embedding_gradient(grad_outputs[0], tokens, ctx.rows)


@torch.library.custom_op("gla_ablate::embedding_gradient", mutates_args=())
def embedding_gradient(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """Σ of `gradient` `[..., dim]` over the places of each token, `[rows, dim]`. An operator, so that no compiler sees
    PyTorch's state change."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return torch.ops.aten.embedding_dense_backward(gradient, tokens, rows, -1, False)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@embedding_gradient.register_fake
def _(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return gradient.new_empty(rows, gradient.shape[-1])
