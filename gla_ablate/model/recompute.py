"""Activation checkpointing: what a block keeps for its backward pass, and what it forms anew there.

    none          what autograd keeps: what every step of a block reads
    elementwise   the block's input and what wide matrix products, attention and the op return; norms, gates, SwiGLU
                  and casts between dtypes are formed anew, which under `torch.compile` fuses with the backward pass
    block         the block's input alone; the whole block runs a second time

Of a block of the 340M model (bf16 autocast, compiled), bytes a token: 45,700, 30,100 and 4,096.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "elementwise", "block"]

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
NARROW = 64  # channels: a product over fewer, such as the gate's of low rank, takes no longer than reading its result
KEPT = {  # operators, by name, that cost too much to run twice (and rsqrt: see `rms_norm`)
    "aten::convolution", "aten::rsqrt",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "gla_ablate::forward", "gla_ablate::valued_forward",
}  # fmt: skip


def keep_products(ctx: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    kept = name in KEPT or (name in PRODUCTS and args[-1].shape[-2] >= NARROW)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


selective = partial(create_selective_checkpoint_contexts, keep_products)


def run_block(layers: Callable[[Tensor], Tensor], x: Tensor, recompute: Recompute) -> Tensor:
    """`layers(x)`, with what it keeps for the backward pass as `recompute` says."""
    if recompute == "none" or not torch.is_grad_enabled():
        return layers(x)
    options: dict[str, Any] = {"context_fn": selective} if recompute == "elementwise" else {}
    return checkpoint(layers, x, use_reentrant=False, **options)


RunBlock = Callable[[Callable[[Tensor], Tensor], Tensor, Recompute], Tensor]


def compiled_block(blocks: int) -> RunBlock:
    """`run_block` through `torch.compile`, for so many blocks of a model: those that are alike share what is compiled.
    Raises PyTorch's limit on how often one function is compiled, for gates that hold something of their layer's
    that no graph takes as an input."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * blocks)
    # Where the chip has it, a kernel is launched while the one before it drains: 3 % of a step of the 340M model.
    early = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return torch.compile(run_block, options={"triton.enable_pdl": True} if early else None)
