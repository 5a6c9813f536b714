"""One token of gated linear attention, for decoding: the public function and its operator `gla_ablate::step`."""

from __future__ import annotations

import torch
from torch import Tensor

from gla_ablate.ops.checks import check_derivatives, check_operands, check_scale, check_tensor, promoted, shape
from gla_ablate.ops.op import resolve_backend, without_autocast


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""One token: `S ← diag(exp(g)) S + kᵀ v` in place, `o = scale · q S`; with a gate on values
    `S ← (exp(g)ᵀ exp(gv)) ∘ S + kᵀ v`. Not differentiable.

    Args:
        q: `[B, G·H, K]`, k: `[B, H, K]`, v: `[B, H, V]`; K and V from 1 to 512, any strides. Each head of k, v, g and
            the state serves G ≥ 1 heads of q, one after the other. float32, bfloat16, float16, or float64 (torch
            backend); computed with in fp32 (fp64 if one of them is float64). Autocast changes nothing here.
        g: log forget gate ≤ 0 (nats), computed with like q: None, `[H]` (one fixed decay a head), `[B, H]` (a head
            and token) or `[B, H, K]` (a channel). −inf is allowed. A gate above 0 or NaN is the caller's error.
        state: S `[B, H, K, V]`, contiguous, fp32 (fp64 for fp64 inputs), no memory of which q, k, v or a gate share on
            the Triton backend; overwritten. It has to be given: zeros at the start of a sequence, or the final state
            that `gated_linear_attention` gives for a prompt.
        gv: log forget gate ≤ 0 on the channels of v, `[B, H, V]`, or None.
        scale: of q; `K ** -0.5` unless given.
        backend: "triton" (CUDA; CPU tensors under `TRITON_INTERPRET=1`), "torch" (plain PyTorch, any device), "auto".

    Returns:
        o `[B, G·H, V]` in the promoted dtype of q, k and v.

    Raises:
        ValueError: naming the argument, what it got and what it takes; also where gradients would be asked for. The
            state is then as it was. With the Triton backend RuntimeError where a forward-mode derivative would be.

    On the Triton backend a call is one kernel that waits for nothing on the host and allocates o alone, so a CUDA graph
    can capture it.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635), section 4.1,
    equation 3; without a gate, section 2.1.
    """
    if state is None:
        raise ValueError("state: got None, takes a tensor [B, H, K, V] (zeros at the start of a sequence)")
    dtype = check_arguments(q, k, v, g, gv, state)
    check_scale(scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if resolve_backend(backend, q.device, dtype) == "torch":
        return plain(q, k, v, g, gv, state, scale, dtype)
    check_derivatives("gated_linear_attention_step", "backend='torch'", q, k, v, g, gv, state)
    return torch.ops.gla_ablate.step(q, k, v, g, gv, state, scale)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, state: Tensor) -> torch.dtype:
    """Shapes, dtypes, devices, the state's layout, no gradients; returns the dtype of o. Raises `ValueError`.

    Runs for every layer and token: it reads no value of a tensor and builds a message only for a refusal.
    """
    check_operands(q, k, v, g, gv, "three dimensions [B, H, channels]")
    B, H, K = k.shape
    V = v.shape[2]
    dtype = promoted(q, k, v)
    check_tensor("state", state, q)
    if state.shape != (B, H, K, V):
        raise ValueError(f"state: got shape {shape(state)}, takes {[B, H, K, V]}")
    if state.dtype != (torch.float64 if dtype == torch.float64 else torch.float32):
        raise ValueError(f"state: got dtype {state.dtype}, takes float32 (float64 for float64 inputs)")
    if not state.is_contiguous():
        raise ValueError(
            f"state: got strides {list(state.stride())}, takes a contiguous tensor, which it updates in place"
        )
    if not torch.compiler.is_compiling() and state.is_neg():
        raise ValueError("state: got a tensor that is negated when it is read, takes one that isn't: resolve_neg()")
    if state.requires_grad:
        raise ValueError("state: got a tensor that requires grad, takes one that doesn't: state.detach()")
    if torch.is_grad_enabled():
        for name, given in (("q", q), ("k", k), ("v", v), ("g", g), ("gv", gv)):
            if given is not None and given.requires_grad:
                raise ValueError(
                    f"{name}: got a tensor that requires grad, takes one that doesn't: a step has no gradient, so call "
                    "it under torch.no_grad(), or use gated_linear_attention"
                )
    return dtype


def plain(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, state: Tensor, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The `"torch"` backend: the same in plain PyTorch, in the state's dtype."""
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    with without_autocast(q.device.type):
        # before the state changes, of which they may be views
        written = k[..., :, None] * v[..., None, :]
        reads = scale * (q.unflatten(1, (k.shape[1], -1)) if q.shape != k.shape else q[..., None, :])  # [B, H, G, K]
        factors = []
        if g is not None:
            factors.append(g.to(state.dtype).exp()[(..., None) if g.dim() == 3 else (..., None, None)])
        if gv is not None:
            factors.append(gv.to(state.dtype).exp()[..., None, :])
        for factor in factors:
            state *= factor
        state += written
        return (reads @ state).flatten(1, 2).to(dtype)


# The Triton kernel as an operator, so that `torch.compile` and `opcheck` know it. `torch.library.custom_op` would add
# some 20 µs of Python to every call, one a layer and token; what it does for autograd isn't needed here.


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, state: Tensor, scale: float) -> Tensor:
    from gla_ablate.ops.kernels import step as kernels  # Triton takes a while to import, and some machines have none

    o = kernels.step(q, k, v, g, gv, state, scale, promoted(q, k, v))
    torch.autograd.graph.increment_version(state)  # a backward that kept this state must see that it has changed
    return o


def fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, state: Tensor, scale: float) -> Tensor:
    return v.new_empty((*q.shape[:2], v.shape[2]), dtype=promoted(q, k, v))


torch.library.define(
    "gla_ablate::step",
    torch.library.infer_schema(step, mutates_args=("state",)),
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("gla_ablate::step", "default", step)
torch.library.register_fake("gla_ablate::step", fake)
