"""The LightningModule: loss, validation metrics, optimiser and schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import SumMetric

from gla_ablate.compilation import resolve_compile, resolve_recompute
from gla_ablate.config import Config, OptimConfig
from gla_ablate.data import build_source
from gla_ablate.distributed import share_of_mean
from gla_ablate.masters import Masters
from gla_ablate.model import build_model
from gla_ablate.ops.cross_entropy import linear_cross_entropy, rows_at_once
from gla_ablate.setting_accuracy import SettingAccuracy
from gla_ablate.sharding import shard
from gla_ablate.tracking import NonFinite, hparams_metrics, log_metrics


class AblationModule(L.LightningModule):
    """A language model trained on next-token cross entropy, averaged over the targets that count.

    A batch is `{"inputs": [B,T], "targets": [B,T]}` of token ids; where targets of −100 are among them, to be ignored,
    also "labelled", the flat indices of the others, and perhaps "weight" (`data.reading.micro_batches`). Logs, with the
    number of optimiser steps done: val/loss (nats a token), val/ppl, and val/bpb where the data know their bytes per
    token, else val/accuracy, and val/accuracy/… for each setting that a task validates. The training curves are
    `tracking.TrainingLog`'s.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        source = build_source(config.data)
        self.bytes_per_token = source.bytes_per_token
        self.model = build_model(config.model, source.vocab_size, config.seed)
        self.masters = Masters(self.model) if config.trainer.precision == "bf16-true" else None
        # Over the targets of one validation. "disable", since the other strategies wait for the device at each update
        # and drop the NaN that must be seen; sums, since MeanMetric ignores its weights under "disable".
        self.val_loss, self.val_correct, self.val_targets = (
            SumMetric(nan_strategy="disable").set_dtype(torch.float64) for _ in range(3)
        )
        self.val_settings = SettingAccuracy(source.val_settings)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compiled = resolve_compile(config, source.vocab_size, device)
        self.recompute = resolve_recompute(config, self.compiled)
        self.model.tune_training(self.compiled, self.recompute)
        self.several = config.trainer.processes > 1
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.step_lr = 0.0  # of the last step

    def configure_model(self) -> None:
        """Leaves each process its share of the weights, if they are to be divided."""
        if self.device_mesh is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            shard(self.model, self.device_mesh["data_parallel"], self.trainer.precision == "bf16-mixed")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def hidden_and_targets(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Hidden states [N,dim] and targets [N] at the N positions that count; the head doesn't see the others."""
        hidden = self.model.hidden(batch["inputs"]).flatten(0, 1)  # [B·T, dim]
        targets = batch["targets"].flatten()  # [B·T]
        if "labelled" in batch:
            hidden, targets = hidden[batch["labelled"]], targets[batch["labelled"]]
        return hidden, targets

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch, or of one of its micro-batches, whose mean is that of the batch."""
        hidden, targets = self.hidden_and_targets(batch)
        # Where micro-batches, or processes, have different numbers of targets that count, none may weigh as any other.
        all_own = batch.get("counted", batch["targets"].numel() * self.config.trainer.accumulate)
        weight = batch.get("weight", 1.0)
        if not len(targets) and (self.several or not weight):  # the mean would be NaN: with gradients of 0
            return share_of_mean(F.linear(hidden, self.model.head.weight).float().sum(), all_own)
        loss = linear_cross_entropy(hidden, self.model.head.weight, targets)
        return share_of_mean(loss if weight == 1 else loss * weight, all_own)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        answers = []
        for loss, correct in self.scored(batch):
            self.val_targets.update(len(loss))
            self.val_loss.update(loss.sum())
            if correct is not None:
                self.val_correct.update(correct.sum())
                answers.append(correct)
        if "setting" in batch:
            self.val_settings.update(batch, torch.cat(answers))

    def scored(self, batch: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of the targets that count, in order and as many at a time as logits may be there: the losses [n], fp32, and
        whether the likeliest token is the right one [n], which isn't asked of text."""
        hidden, targets = self.hidden_and_targets(batch)
        at_once = rows_at_once(self.model.head.weight)
        for own, target in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            logits = self.model.head(own)
            loss = F.cross_entropy(logits.float(), target, reduction="none")
            yield loss, None if self.bytes_per_token is not None else logits.argmax(-1) == target

    def on_validation_epoch_end(self) -> None:
        targets = self.val_targets.compute()
        loss = self.val_loss.compute() / targets
        if not loss.isfinite():
            raise NonFinite("val/loss", loss.item(), self.trainer.global_step)
        metrics = {"val/loss": loss.item(), "val/ppl": loss.exp().item()}
        if self.bytes_per_token is None:
            metrics["val/accuracy"] = (self.val_correct.compute() / targets).item()
            metrics |= self.val_settings.compute() if self.val_settings.names else {}
        else:
            metrics["val/bpb"] = metrics["val/loss"] / math.log(2) / self.bytes_per_token
        if self.trainer.global_step >= self.config.trainer.max_steps:
            # The HParams tab's, under tags of their own: one point each, no curve.
            metrics |= {tag: metrics[tag.replace("hp", "val")] for tag in hparams_metrics(self.bytes_per_token)}
        log_metrics(self.trainer, metrics)
        for total in (self.val_loss, self.val_correct, self.val_targets, self.val_settings):
            total.reset()

    def on_after_backward(self) -> None:
        if self.masters:
            self.masters.take_gradients()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips to the global norm and keeps that norm for the log: computed once, and never waited for."""
        updated = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(updated, gradient_clip_val or math.inf)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.step_lr = optimizer.param_groups[0]["lr"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW that decays matrices alone (norm weights, biases and a gate's vectors are left free)."""
        optim = self.config.optim
        updated = [self.masters.of(p) if self.masters else p for p in self.parameters() if p.requires_grad]
        matrices, vectors = [p for p in updated if p.ndim >= 2], [p for p in updated if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            fused=True,
        )
        if self.masters:
            masters = self.masters
            optimizer.register_step_post_hook(lambda *_: masters.write_back())
        max_steps = self.config.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, optim, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the config as plain values, so that the file says what it holds and loads with `weights_only=True`."""
        checkpoint["config"] = dataclasses.asdict(self.config)
        if self.masters:  # in place of what they were rounded to
            checkpoint["state_dict"] |= self.masters.named(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.masters:
            self.masters.load(self, checkpoint["state_dict"])


def lr_factor(step: int, optim: OptimConfig, max_steps: int) -> float:
    """The learning rate of 0-based `step` as a fraction of `optim.lr`: linear up to 1 at the end of the warm-up, then
    half a cosine that reaches `min_lr_ratio` at the last step."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, max_steps - 1 - optim.warmup_steps)
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
