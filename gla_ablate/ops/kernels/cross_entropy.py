"""Rows of logits → their cross entropy and, in place of the logits, its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gla_ablate.ops.kernels.launching import launch

BLOCK, WARPS = 4096, 8


@triton.jit
def cross_entropy_kernel(logits, targets, loss, V: tl.constexpr, BLOCK: tl.constexpr):
    """loss `[N]` fp32 = logsumexp(logits) − logits[target]; logits `[N, V]` ← softmax(logits) − onehot(target).
    Grid: N.

    The first pass over a row keeps a running maximum and the sum of exponentials below it; the second reads the row
    again, from L2 as a rule.
    """
    row = tl.program_id(0).to(tl.int64)
    p = logits + row * V
    target = tl.load(targets + row)
    chosen = tl.load(p + target).to(tl.float32)
    o_v = tl.arange(0, BLOCK)
    most, total = float("-inf"), 0.0
    for i in range(0, V, BLOCK):
        b = tl.load(p + i + o_v, mask=i + o_v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(b, axis=0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(b - higher), axis=0)
        most = higher
    tl.store(loss + row, tl.log(total) + most - chosen)
    tl.debug_barrier()  # the chosen logit has been read by every thread
    for i in range(0, V, BLOCK):
        m_v = i + o_v < V
        b = tl.load(p + i + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        b = tl.exp(b - most) / total - tl.where(i + o_v == target, 1.0, 0.0)
        tl.store(p + i + o_v, b.to(logits.dtype.element_ty), mask=m_v)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row, `[N]` fp32; contiguous logits `[N, V]` become its gradient."""
    N, V = logits.shape
    loss = logits.new_empty(N, dtype=torch.float32)
    launch(cross_entropy_kernel, N, logits=logits, targets=targets, loss=loss, V=V, BLOCK=BLOCK, num_warps=WARPS)
    return loss
