"""What gates do while a model is validated: how much they forget, and how long they remember."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gla_ablate.distributed import largest, total
from gla_ablate.model.gates import Decay
from gla_ablate.model.mixer import GLAMixer
from gla_ablate.tracking import log_metrics

HISTOGRAM_VALUES = 4096  # values drawn from a gate's output for a histogram
TRIED = 64  # tokens on which a gate is tried before the first step


class GateStatistics(L.Callback):
    """What the gates do on the validation data, for each layer l and head h, logged after each validation:

    gate/layer{l}/head{h}/forget    mean forget gate exp(g) over tokens and channels
    gate/layer{l}/head{h}/memory    the memory length in tokens that it means, −1 / mean g, at most `seq_len`

    and in TensorBoard, under `…_histogram`, the distribution of both over the tokens and channels of the first batch.
    l counts all layers; those without a gate, softmax layers, have nothing of this. With a gate on values both are of
    numbers of the state, which decay by g + gv: those along its diagonal.
    Without decay, forget is 1 and memory `seq_len`. A gate that lets the state grow, g > 0, is no forget gate and fails
    the trial with a `ValueError`: the op doesn't look at values, and the trial might even win. Before the first step
    each gate is tried on numbers like those of a norm, so that a wrong sign shows at once, not hours later; not under
    fsdp, where a process has its share of the weights alone.
    """

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self._hooks: list[Any] = []
        self._sums: dict[int, Tensor] = {}  # a layer: [2, H], batch rows · means of exp(g) and of g
        self._samples: dict[int, Tensor] = {}  # a layer: [H, n], values of g
        self._largest: dict[int, Tensor] = {}  # a layer: the largest g so far
        self._rows = 0
        self._counts = True  # whether the batch does

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        for layer, block in enumerate(module.model.blocks):
            if isinstance(block.mixer, GLAMixer) and (most := tried(block.mixer, min(TRIED, self.seq_len))) is not None:
                check(layer, most)

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._counts = "filler" not in batch

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        self._sums, self._samples, self._largest, self._rows = {}, {}, {}, 0
        for layer, block in enumerate(module.model.blocks):
            if isinstance(block.mixer, GLAMixer):
                self._hooks.append(block.mixer.gate.register_forward_hook(self._observer(layer, block.mixer.heads)))

    def _observer(self, layer: int, heads: int) -> Callable[[nn.Module, tuple[Tensor, ...], Decay], None]:
        def observe(gate: nn.Module, args: tuple[Tensor, ...], g: Decay) -> None:
            x = args[0]
            values = by_head(g, heads, x.device)  # [H, n]
            rows = len(x) if self._counts else 0
            sums = rows * torch.stack([values.exp().mean(1), values.mean(1)])
            if layer not in self._sums:  # the first batch
                self._sums[layer] = sums
                self._samples[layer] = values[:, :: math.ceil(values.shape[1] / HISTOGRAM_VALUES)]
                self._largest[layer] = highest(g, values)
            else:
                self._sums[layer] += sums
                self._largest[layer] = torch.maximum(self._largest[layer], highest(g, values))
            if layer == min(self._sums):
                self._rows += rows

        return observe

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self._sums:  # a model of softmax layers alone
            return
        for layer, most in zip(self._sums, largest(torch.stack([*self._largest.values()])).tolist(), strict=True):
            check(layer, most)
        sums = torch.stack([*self._sums.values()])  # [layers with a gate, 2, H]
        means = total(sums).cpu() / total(torch.full((), self._rows, device=sums.device)).item()
        scalars = {}
        for layer, (forget, g) in zip(self._sums, means, strict=True):
            for head, (f, m) in enumerate(zip(forget.tolist(), memory_length(g, self.seq_len).tolist(), strict=True)):
                scalars[f"gate/layer{layer}/head{head}/forget"] = f
                scalars[f"gate/layer{layer}/head{head}/memory"] = m
        log_metrics(trainer, scalars)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._add_histograms(logger, trainer.global_step)

    def _add_histograms(self, logger: TensorBoardLogger, step: int) -> None:
        for layer, sample in self._samples.items():
            for head, g in enumerate(sample.cpu()):
                tag = f"gate/layer{layer}/head{head}"
                logger.experiment.add_histogram(f"{tag}/forget_histogram", g.exp(), step)
                logger.experiment.add_histogram(f"{tag}/memory_histogram", memory_length(g, self.seq_len), step)


def check(layer: int, most: float) -> None:
    if most > 0:
        raise ValueError(f"the gate of layer {layer} gave a log decay of {most:g}, takes at most 0")


@torch.no_grad()
def tried(mixer: GLAMixer, tokens: int) -> float | None:
    """The largest log decay of its gate on so many tokens of a standard normal distribution; None where that can't be
    told so. Of a copy, and all generators stay as they were: the trial is the same with it and without."""
    weight = mixer.q_proj.weight
    if isinstance(weight, DTensor):  # of which this process has a share alone
        return None
    x = torch.randn(1, tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    try:
        with isolate_rng(include_cuda=False), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            g = copy.deepcopy(mixer.gate).eval().forward(x)  # past its hooks, which are others'
            return highest(g, by_head(g, mixer.heads, x.device)).item()
    except Exception:  # a plugin's gate can do anything; what is wrong with it the first step tells
        return None


def highest(g: Decay, values: Tensor) -> Tensor:
    """The largest log decay; of two gates, of either."""
    return torch.maximum(g[0].max(), g[1].max()).float() if isinstance(g, tuple) else values.max()


def by_head(g: Decay, heads: int, device: torch.device) -> Tensor:
    """A gate's output in any of its shapes → [H, n], n values a head; no gate is a g of 0."""
    if isinstance(g, tuple):
        keys, values = (x.float() for x in g)
        n = torch.arange(max(keys.shape[-1], values.shape[-1]), device=device)
        g = keys[..., n * keys.shape[-1] // len(n)] + values[..., n * values.shape[-1] // len(n)]
    if g is None:
        return torch.zeros(heads, 1, device=device)
    if g.ndim == 1:  # [H]
        return g.float().unsqueeze(1)
    return g.float().movedim(2, 0).flatten(1)  # [B, T, H] or [B, T, H, K]


def memory_length(g: Tensor, cap: int) -> Tensor:
    """Tokens after which a log decay of g a token has forgotten all but 1/e: −1/g, at most `cap`."""
    return g.abs().reciprocal().clamp(max=cap)
