"""A step of decoding as a CUDA graph: the host launches one graph a token, where the step's kernels one by one take it
seven times as long as the device (340M model, H200).

A graph does again what was done while it was captured, on the same memory. So only a step that is the same for every
token can be one: that of layers that carry a state and know no position. Softmax layers see more with every token, and
rotary positions turn further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    return Replayed(step) if replayable(model) else step


def replayable(model: LanguageModel) -> bool:
    mixers = [cast(Block, block).mixer for block in model.blocks]
    same = all(isinstance(mixer, GLAMixer) and not mixer.rope for mixer in mixers)
    return same and model.embedding.weight.device.type == "cuda"


class Replayed:
    """`step`, captured at its second call and replayed from there on; the first loads kernels, which a capture can't.
    A step that can't be captured, since a gate of the user's waits for the device, is run as it is."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capturable = True
        self._first = True
        self._token = self._logits = torch.empty(0)

    def __call__(self, token: Tensor) -> Tensor:
        if self._first or not self.capturable:
            self._first = False
            return self.step(token)
        if self.graph is None:
            self._capture(token)
            if self.graph is None:
                return self.step(token)
        self._token.copy_(token)
        self.graph.replay()
        return self._logits

    def _capture(self, token: Tensor) -> None:
        self._token, graph = token.clone(), torch.cuda.CUDAGraph()
        # What autocast has kept of weights is freed when the caller leaves it, behind the graph's back.
        dtype, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        try:
            with (
                own_generator(token.device),
                torch.cuda.graph(graph),
                torch.autocast("cuda", dtype, enabled=on, cache_enabled=False),
            ):
                self._logits = self.step(self._token)
            self.graph = graph
        except RuntimeError:
            torch.cuda.synchronize()
            self.capturable = False


@contextmanager
def own_generator(device: torch.device) -> Iterator[None]:
    """Inside, the GPU's generator is a copy of what it was: a capture that fails leaves the one that it found unusable
    for good (PyTorch 2.11: "Offset increment outside graph capture")."""
    generator = torch.cuda.default_generators[device.index or 0]
    before = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(before)


def cast_projections(model: LanguageModel, dtype: torch.dtype) -> None:
    """Leave the model the weights of its projections in `dtype` alone, as autocast casts them in every step; what it
    gives under autocast stays the same, to the bit. A gate of the user's, which may compute in fp32, keeps its own. No
    more training."""
    gates = [mixer.gate for block in model.blocks if isinstance(mixer := cast(Block, block).mixer, GLAMixer)]
    foreign = [gate for gate in gates if type(gate).__module__ != Gate.__module__]
    kept = {module for gate in foreign for module in gate.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in kept:
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)  # tied ones are two from now on
