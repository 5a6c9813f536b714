"""The cross entropy of a linear head, without the logits of all tokens: the operator `gla_ablate::head_loss`.

At a vocabulary of 32,000 the logits of 32,768 tokens take 2 GiB in bf16, and their cross entropy three times that in
fp32 on the way. Here rows come in chunks: the logits of one, its loss, and at once what its gradient adds to those of
hidden states and weight, in the memory of the next chunk's logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gla_ablate.ops.checks import check_derivatives
from gla_ablate.ops.op import autocasts, resolve_backend

# Logits that are there at a time. The kernel keeps them in 16 bits and turns them into their gradient in place; plain
# PyTorch has several copies in fp32. (32,768 tokens of width 1024 on an H200 with the kernel: 14.0, 12.9, 11.6, 11.5 ms
# and 253, 323, 583, 1103 MiB at 2^25 … 2^28; 32.7 ms and 512 MiB without, at 2^25.)
AT_ONCE = {"torch": 2**25, "triton": 2**27}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """The mean over N tokens of −log softmax(hidden · weightᵀ)[target], a scalar in fp32 (fp64 for fp64 inputs).

    Args:
        hidden: `[N, D]`, weight: `[vocab, D]`; floating point. Under autocast the products are in its dtype, else in
            the promoted one; the softmax, the loss and the sum of the weight's gradient over chunks are in fp32.
        targets: `[N]` int64, each from 0 to vocab − 1 (the caller's part: they are not looked at).
        backend: "torch" (plain PyTorch, any device), "triton" (CUDA; CPU tensors under `TRITON_INTERPRET=1`), "auto".

    Where all logits are few they are formed as one, by PyTorch's own functions. Else gradients are formed with the
    loss; there is no second derivative.

    Raises `ValueError` for shapes that don't fit, and, where logits are many, `RuntimeError` for a second derivative, a
    forward-mode one and `torch.func`'s.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden, weight: got {list(hidden.shape)}, {list(weight.shape)}, take [N, D], [vocab, D]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: got {list(targets.shape)}, takes {list(hidden.shape[:1])}")
    kind = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    casts = autocasts(kind, dtype)
    if casts:
        dtype = torch.get_autocast_dtype(kind)
    if hidden.shape[0] * weight.shape[0] <= AT_ONCE["torch"]:
        logits = F.linear(hidden, weight) if casts else F.linear(hidden.to(dtype), weight.to(dtype))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
    plain = resolve_backend(backend, hidden.device, dtype) == "torch"
    check_derivatives("linear_cross_entropy in chunks", "F.cross_entropy of F.linear", hidden, weight)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, _, _ = torch.ops.gla_ablate.head_loss(hidden.to(dtype), weight, targets, dtype, plain, learns)
    return total / hidden.shape[0]


def rows_at_once(weight: Tensor, backend: str = "torch") -> int:
    """Tokens whose logits are there at a time."""
    return max(AT_ONCE[backend] // weight.shape[0], 1)


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, plain: bool, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses and, if it `learns`, its gradients: of hidden, in its dtype, of weight in fp32."""
    total, d_hidden, d_weight = head_loss_shapes(hidden, weight, targets, dtype, plain, learns)
    for x in (total, d_weight):
        x.zero_()
    matrix, rows = weight.detach().to(dtype), rows_at_once(weight, "torch" if plain or not learns else "triton")
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, len(hidden), rows):
            own, chosen = hidden.detach()[begin : begin + rows], targets[begin : begin + rows]
            logits = own @ matrix.T
            if not learns:
                total += F.cross_entropy(logits.to(total.dtype), chosen, reduction="sum")
                continue
            loss, gradient = (by_torch if plain else by_triton)(logits, chosen)
            total += loss.sum()
            torch.mm(gradient, matrix, out=d_hidden[begin : begin + rows])
            add_product(d_weight, gradient.T, own)
    return total, d_hidden, d_weight


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, without rounding the product to the dtype of a and b where the device can do without."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def head_loss_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, plain: bool, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape) if learns else ((0,), (0,))
    wide = torch.promote_types(dtype, torch.float32)
    total, d_weight = hidden.new_empty((), dtype=wide), weight.new_empty(shapes[1], dtype=wide)
    return total, hidden.new_empty(shapes[0]), d_weight


def by_torch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row in fp32 or fp64, and the gradient of their sum in the logits' dtype."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_total = wide.logsumexp(1, keepdim=True)
    loss = log_total - wide.gather(1, targets[:, None])
    gradient = (wide - log_total).exp_()
    gradient.scatter_add_(1, targets[:, None], torch.full_like(loss, -1.0))
    return loss, gradient.to(logits.dtype)


def by_triton(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one pass of a program a row."""
    from gla_ablate.ops.kernels.cross_entropy import cross_entropy  # Triton takes a while to import

    return cross_entropy(logits, targets), logits


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, d_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_total is None:
        return (None,) * 6
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("linear_cross_entropy has no second derivative in chunks")
    d_hidden, d_weight = ctx.saved_tensors
    return (d_hidden * d_total).to(d_hidden.dtype), (d_weight * d_total).to(ctx.weight_dtype), None, None, None, None


torch.library.define(
    "gla_ablate::head_loss",
    torch.library.infer_schema(head_loss, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("gla_ablate::head_loss", "default", head_loss)
torch.library.register_fake("gla_ablate::head_loss", head_loss_shapes)
torch.library.register_autograd("gla_ablate::head_loss", gradients, setup_context=save)
