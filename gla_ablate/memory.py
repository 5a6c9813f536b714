"""What training a model will keep in memory at most, without the memory: a step on tensors that have no data."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gla_ablate.compilation import resolve_compile, resolve_recompute
from gla_ablate.config import Config
from gla_ablate.masters import Masters
from gla_ablate.model import count_parameters
from gla_ablate.model.kinds import mixers
from gla_ablate.model.language_model import LanguageModel
from gla_ablate.model.shapes import build_gates
from gla_ablate.ops.cross_entropy import linear_cross_entropy

OPTIMISER = 2 * 4  # bytes a parameter: AdamW's moments
WEIGHT, WEIGHT_AND_MASTER = 4, 2 + 4


class Peak(TorchDispatchMode):
    """Bytes of all that operators return, at most at one time. What they allocate inside for themselves isn't seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.alive:
            size = storage.nbytes()
            self.alive.add(storage._cdata)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.remove, storage._cdata, size)

    def remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class Untraced(Exception):
    """A step can't be traced without numbers, and why."""


def training_bytes(config: Config, vocab_size: int, device: str, bf16: bool) -> int:
    """Weights, gradients, AdamW's moments and a step's activations at their peak. Raises `Untraced`.

    All targets count as the data's. Layers with the same mixer are alike, so that the first and one more of each kind
    tell what many take. Of several devices it is what each has; under fsdp what is gathered counts as if it stayed in
    bf16. CUDA's and the libraries' own memory comes on top, and what the allocator rounds up.
    """
    parameters = count_parameters(config.model, vocab_size)
    first, *rest = mixers(config.model)
    try:
        total = one = step_bytes(config, 1, vocab_size, device, bf16)
        for kind in set(rest):
            pair = replace(config, model=replace(config.model, mixer=[first, kind]))
            total += rest.count(kind) * (step_bytes(pair, 2, vocab_size, device, bf16) - one)
    except Exception as error:  # a plugin's gate can do anything, and so what needs numbers
        raise Untraced(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}") from error
    weight = WEIGHT_AND_MASTER if config.trainer.precision == "bf16-true" else WEIGHT
    count = config.trainer.processes
    if config.trainer.strategy == "fsdp":  # of gradients, which the trace holds whole, a device has its share as well
        return ((WEIGHT + OPTIMISER) * parameters - WEIGHT * parameters * (count - 1)) // count + total
    return (weight + OPTIMISER) * parameters + total


def step_bytes(config: Config, layers: int, vocab_size: int, device: str, bf16: bool, fake: bool = True) -> int:
    """The peak of gradients and activations over two steps of a model with so many layers, or two micro-batches of one.
    As in Lightning, gradients stay until the forward pass of the next step is over."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # loads torch's compiler: a second

    model_config = replace(config.model, layers=layers)
    parts = config.trainer.accumulate
    shape = config.data["batch_size"] // (config.trainer.processes * parts), config.data["seq_len"]
    recompute = resolve_recompute(config, resolve_compile(config, vocab_size, torch.device(device)))
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
        with torch.device(device):
            model = LanguageModel(model_config, vocab_size, build_gates(model_config, seed=0))
            model.tune_training(False, recompute)  # compiled, the same is kept, or a little less
            tokens = torch.zeros(shape, dtype=torch.long)
            masters = Masters(model) if config.trainer.precision == "bf16-true" else None
        with Peak() as peak:
            for step in range(2):
                with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                    loss = linear_cross_entropy(model.hidden(tokens).flatten(0, 1), model.head.weight, tokens.flatten())
                if not step or parts == 1:
                    model.zero_grad()
                loss.backward()
                if masters:
                    masters.take_gradients()
                    if parts == 1:
                        masters.write_back()
    return peak.most
