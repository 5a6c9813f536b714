"""A step of decoding as a CUDA graph: the host launches one graph a token, where launching the step's kernels one by
one takes it ten times as long as the device (340M model, H200).

A graph does again what was done while it was captured, on the same memory, and nothing of what Python did meanwhile. So
only a step that is the same for every token can be one: of layers that carry a state and know no position (softmax
layers see more with every token, rotary positions turn further), with gates of this package, which are functions of
their input (one of a user's may count, draw or wait for the device), and without hooks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gla_ablate.model import LanguageModel
from gla_ablate.model.block import Block
from gla_ablate.model.gates import Gate
from gla_ablate.model.mixer import GLAMixer


def stepper(model: LanguageModel, cache: list[Any]) -> Callable[[Tensor], Tensor]:
    """token [B] → logits [B,vocab] of the next one, `cache` going on; under `torch.no_grad()` and always the same
    autocast. On a GPU replayed where that can be, from the second token on; logits are then overwritten by the next."""

    def step(token: Tensor) -> Tensor:
        return model(token[:, None], cache=cache)[:, -1]

    device = model.embedding.weight.device
    # A graph is captured on the current GPU.
    here = device.type == "cuda" and device.index == torch.cuda.current_device()
    return Replayed(step) if here and same_for_every_token(model) else step


def same_for_every_token(model: LanguageModel) -> bool:
    """Whether a step of decoding does nothing that a replay would leave out."""
    for block in model.blocks:
        mixer = cast(Block, block).mixer
        if not isinstance(mixer, GLAMixer) or mixer.rope or not own(mixer.gate):
            return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def own(gate: Gate) -> bool:
    """Whether it is one of this package's; a plugin's file is a module outside of it."""
    return type(gate).__module__.startswith("gla_ablate.")


class Replayed:
    """`step`, captured at its second call and replayed from then on; the first loads kernels, which a capture can't."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._token = self._logits = torch.empty(0)

    def __call__(self, token: Tensor) -> Tensor:
        if not self._warm:
            self._warm = True
            return self.step(token)
        if self.graph is None:
            self.graph = self._capture(token)
        self._token.copy_(token)
        self.graph.replay()
        return self._logits

    def _capture(self, token: Tensor) -> torch.cuda.CUDAGraph:
        self._token, graph = token.clone(), torch.cuda.CUDAGraph()
        gc.collect()  # a graph that goes while another is captured breaks that off
        # What autocast has kept of weights is freed when the caller leaves it, behind the graph's back.
        dtype, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.cuda.graph(graph), torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
            self._logits = self.step(self._token)
        return graph


def cast_projections(model: LanguageModel, dtype: torch.dtype) -> None:
    """Leave the model the weights of its projections in `dtype` alone, as autocast to it casts them in every step.

    Under `torch.no_grad()` and that autocast, which it needs from now on, it gives the same to the bit; it can't be
    trained any more. A gate of the user's, which may compute in fp32, keeps its own.
    """
    kept = {x for gate in model.modules() if isinstance(gate, Gate) and not own(gate) for x in gate.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in kept:
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)  # tied ones are two from now on
