"""Length extrapolation: a trial that has trained on rows of `data.seq_len` tokens is judged on longer ones too.

`eval.lengths` are multiples of `data.seq_len`. After the last validation, with the weights that it had:

    eval/loss_at_{m}x       nats a token, the mean over all targets of rows of m · seq_len tokens, as val/loss is
    eval/accuracy_at_{m}x   the same of tasks, as val/accuracy is

logged once, under the last step, and `positions.csv`, which says where in a row the loss is what it is: a row's T
positions fall into n = min(64, T) buckets, number i with positions ⌈i · T / n⌉ up to, not including, ⌈(i + 1) · T / n⌉.
TensorBoard has it of the longest rows as the curve eval/loss_by_position, with the position (a bucket's end) for step.

All lengths that divide the longest are judged on the same tokens of a text, those of evenly spaced spans as long as the
longest row: only the context differs. Those of val/loss are spaced by shorter rows, and other ones unless `val_tokens`
hold the whole text; on 8,192 tokens of two texts a loss differs by 0.03, and from length to length by 0.003. A task
draws rows anew for each length, at 1x those of val/loss.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from gla_ablate.data.module import DataModule
from gla_ablate.distributed import total
from gla_ablate.experiment_checks import length_tag
from gla_ablate.status import replace
from gla_ablate.tracking import log_metrics

POSITIONS = "positions.csv"
COLUMNS = "multiple,start,end,tokens,loss,accuracy"  # of it: a row for each length and bucket; positions count from 0
BUCKETS = 64  # of a row: 4 for the length of training in rows 16 times as long


@dataclass(frozen=True)
class AtLength:
    """What rows of `multiple · seq_len` tokens gave: sums over the targets that count, in buckets [n] and in all."""

    multiple: int
    seq_len: int  # of these rows
    tokens: list[float]
    losses: list[float]
    correct: list[float] | None  # None of text
    whole: list[float]  # tokens, loss, correct

    def metrics(self) -> dict[str, float]:
        tokens, loss, correct = self.whole
        found = {length_tag("loss", self.multiple): mean(loss, tokens)}
        return found if self.correct is None else found | {length_tag("accuracy", self.multiple): mean(correct, tokens)}

    def by_position(self) -> list[tuple[int, int, float, float, float | None]]:
        """(start, end, tokens, loss, accuracy) of each bucket; NaN where it has no target that counts."""
        n = len(self.tokens)
        starts = [-(-i * self.seq_len // n) for i in range(n + 1)]
        correct = [None] * n if self.correct is None else self.correct
        return [
            (start, end, tokens, mean(loss, tokens), None if right is None else mean(right, tokens))
            for start, end, tokens, loss, right in zip(
                starts[:-1], starts[1:], self.tokens, self.losses, correct, strict=True
            )
        ]


class LengthEvaluation(L.Callback):
    """Evaluates at all `lengths` after the last validation. Has to come before the callback that saves, so that a
    checkpoint of the last step holds it: a trial that ends before goes on to do it, and one that has it doesn't again.

    Loss and accuracy may become NaN or infinite at lengths far from those of training, which is a result, too.
    """

    def __init__(self, lengths: list[int], data: DataModule, folder: Path) -> None:
        self.lengths, self.data, self.folder = lengths, data, folder

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        found = []
        for multiple in self.lengths:
            found.append(self.evaluate(trainer, module, multiple))
            log_metrics(trainer, found[-1].metrics())
            if trainer.is_global_zero:
                said = ", ".join(f"{tag} {value:.4f}" for tag, value in found[-1].metrics().items())
                print(f"rows of {found[-1].seq_len} tokens: {said}", flush=True)
        if trainer.is_global_zero:
            replace(self.folder / POSITIONS, positions_csv(found).encode())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                add_curves(logger, found[-1])

    @torch.no_grad()
    def evaluate(self, trainer: L.Trainer, module: Any, multiple: int) -> AtLength:
        """Over all rows. Every process takes its share, and all call the network equally often."""
        seq_len = multiple * self.data.source.seq_len
        n = min(BUCKETS, seq_len)
        bucket = torch.arange(seq_len, device=module.device) * n // seq_len  # of each position [T]
        sums = torch.zeros(3, n, dtype=torch.float64, device=module.device)  # tokens, loss, correct
        whole = torch.zeros(3, dtype=torch.float64, device=module.device)
        text = module.bytes_per_token is not None
        module.eval()
        with closing(self.data.longer_val_dataloader(multiple, self.lengths[-1])) as reader:
            for read in reader:
                batch = trainer.strategy.batch_to_device(read)
                at = bucket.repeat(len(batch["targets"]))  # [B·T]
                at = at[batch["labelled"]] if "labelled" in batch else at
                with trainer.precision_plugin.val_step_context():
                    for loss, correct in module.scored(batch):
                        scores = [torch.ones_like(loss), loss, torch.zeros_like(loss) if correct is None else correct]
                        sums.index_add_(1, at[: len(loss)], torch.stack([x.double() for x in scores]))
                        whole += torch.stack([x.sum().double() for x in scores])  # rounded as validation does
                        at = at[len(loss) :]
        tokens, losses, right = total(sums).tolist()
        return AtLength(multiple, seq_len, tokens, losses, None if text else right, total(whole).tolist())


def mean(summed: float, count: float) -> float:
    return summed / count if count else float("nan")


def positions_csv(found: list[AtLength]) -> str:
    """Full precision; loss and accuracy stay empty where nothing was asked."""
    lines = [COLUMNS]
    for at in found:
        for start, end, tokens, loss, accuracy in at.by_position():
            values = [loss if tokens else "", accuracy if tokens and accuracy is not None else ""]
            lines.append(",".join(map(str, [at.multiple, start, end, int(tokens), *values])))
    return "\n".join(lines) + "\n"


def add_curves(logger: TensorBoardLogger, at: AtLength) -> None:
    for _, end, tokens, loss, accuracy in at.by_position():
        if tokens:
            logger.experiment.add_scalar("eval/loss_by_position", loss, end)
            if accuracy is not None:
                logger.experiment.add_scalar("eval/accuracy_by_position", accuracy, end)
