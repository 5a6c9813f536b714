"""What a trial tells while it runs: training curves, and the loggers that keep them.

Everything is logged by `log_metrics`, with the number of optimiser steps done: Lightning's own `self.log` would count
from 0 and does work on every step, while here the device is waited for only every `log_every` steps.
"""

from __future__ import annotations

import csv
import functools
import math
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from gla_ablate import curves
from gla_ablate.config import Config
from gla_ablate.distributed import processes, total
from gla_ablate.hparams import flat_hparams


class NonFinite(ArithmeticError):
    """A loss is NaN or infinite: the trial has failed."""

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"{what} is {value} at step {step}")


def log_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Hand `metrics` to all loggers under the number of optimiser steps done."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the micro-batch of that number is the last of its optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class MetricsCSV(Logger):
    """`metrics.csv` in long form, `step,metric,value`, in full precision, flushed as it comes."""

    def __init__(self, path: Path, go_on: bool = False) -> None:
        """`go_on`: with what is there already."""
        super().__init__()
        self.last: dict[str, float] = {}  # metric → the value logged last
        if go_on:
            with path.open() as file:
                self.last = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
        self._file = path.open("a" if go_on else "w", buffering=1)
        if not go_on:
            self._file.write(f"{curves.HEADER}\n")

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in `config.yaml`."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._file.write("".join(f"{step},{metric},{value!r}\n" for metric, value in metrics.items()))
        self.last.update(metrics)

    def close(self) -> None:
        """Also for those who read it on another machine, and hold it against what is written next."""
        os.fsync(self._file.fileno())
        self._file.close()


class TrainingLog(L.Callback):
    """Logs train/loss, train/grad_norm, lr, train/tokens_per_s, train/data_wait_ms and, on a GPU, train/mfu every
    `log_every` steps and after the last one; stops a trial whose loss isn't finite; reports progress.

    train/loss is the loss of the step itself. Speed is taken over the steps since the last log, without validation;
    so is train/data_wait_ms, the milliseconds a step for which the loop stood still until a batch had been read. On a
    GPU, which may have work left meanwhile, that is the most that reading can have held it up. train/mfu
    (`utilisation`) is over the same steps as the speed.
    """

    def __init__(
        self,
        log_every: int,
        progress: Callable[[int, float | None, float | None], None],
        waited: Callable[[], float] = lambda: 0.0,
        peak_tokens_per_s: float | None = None,
    ) -> None:
        """`progress(step, last known loss, last known tokens/s)` is called after each step; `waited()` tells the
        seconds that the loop has waited for data so far; `peak_tokens_per_s` is the speed at a utilisation of 1."""
        self.log_every = log_every
        self.progress = progress
        self.waited = waited
        self.peak_tokens_per_s = peak_tokens_per_s
        self.tokens = 0  # trained on so far
        self.rates: list[float] = []  # tokens/s of each interval between two logs
        self._earlier: list[float] = []  # losses of steps since the last log that an earlier process did
        self._losses: list[Tensor] = []  # of the others since then, on the device
        self._parts: list[Tensor] = []  # of the step under way, of its micro-batches, each divided by their number
        self._loss: float | None = None
        self._clock = Stopwatch()
        self._tokens_at_log = 0
        self._waited_at_log: float | None = None  # None: no step of this process has begun
        self._waited_earlier = 0.0  # seconds since the last log in an earlier process

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._waited_at_log is None:  # what came before was the start
            self._waited_at_log = self.waited() - self._waited_earlier
        self._clock.start()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()  # queued training steps are training time
        self._clock.stop()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self._parts.append(outputs["loss"])
        self.tokens += batch["inputs"].numel() * trainer.world_size
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        self._losses.append(functools.reduce(operator.add, self._parts))
        self._parts = []
        if step % self.log_every == 0 or step == trainer.max_steps:
            self._log(trainer, module)
        self.progress(step, self._loss, self.rates[-1] if self.rates else None)

    def _log(self, trainer: L.Trainer, module: Any) -> None:
        losses = self._since_the_last()
        self._earlier, self._losses = [], []
        for step, loss in enumerate(losses, start=trainer.global_step - len(losses) + 1):
            if not math.isfinite(loss):
                raise NonFinite("loss", loss, step)
        self._loss = losses[-1]
        self.rates.append((self.tokens - self._tokens_at_log) / self._clock.lap())
        self._tokens_at_log = self.tokens
        waited, self._waited_at_log = self._wait(), self.waited()
        metrics = {
            "train/loss": self._loss,
            "train/grad_norm": module.grad_norm.item(),
            "lr": module.step_lr,
            "train/tokens_per_s": self.rates[-1],
            "train/data_wait_ms": 1e3 * waited / len(losses),
        }
        if self.peak_tokens_per_s:
            metrics["train/mfu"] = self.rates[-1] / self.peak_tokens_per_s
        log_metrics(trainer, metrics)
        if not trainer.is_global_zero:
            return
        print(
            f"step {trainer.global_step}/{trainer.max_steps}  loss {self._loss:.4f}  {self.rates[-1]:,.0f} tokens/s",
            flush=True,
        )

    def _since_the_last(self) -> list[float]:
        """The losses of the steps since the last log: where the host waits for the device, and for other processes."""
        return self._earlier + ((total(torch.stack(self._losses)) / processes()).tolist() if self._losses else [])

    def _wait(self) -> float:
        """Seconds that data were waited for since the last log."""
        return self._waited_earlier if self._waited_at_log is None else self.waited() - self._waited_at_log

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "rates": self.rates,
            "losses": self._since_the_last(),
            "loss": self._loss,
            "tokens_at_log": self._tokens_at_log,
            "seconds": self._clock.seconds(),
            "waited": self._wait(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.rates, self._earlier = state["tokens"], list(state["rates"]), list(state["losses"])
        self._loss, self._tokens_at_log = state["loss"], state["tokens_at_log"]
        self._clock, self._waited_earlier = Stopwatch(state["seconds"]), state["waited"]

    @property
    def tokens_per_s(self) -> float:
        """Median over the intervals between logs; the first, which holds the warm-up, only counts if it is alone."""
        return median(self.rates[1:] or self.rates)


class Stopwatch:
    """Seconds that it ran since the last lap."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._started: float | None = None

    def seconds(self) -> float:
        return self._seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def start(self) -> None:
        """Go on, if stopped."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Pause, if running."""
        self._seconds, self._started = self.seconds(), None

    def lap(self) -> float:
        """The seconds since the last lap; the next begins, running."""
        self.stop()
        seconds, self._seconds = self._seconds, 0.0
        self.start()
        return seconds


def declare_hparams(logger: TensorBoardLogger, config: Config, fresh: bool = True) -> None:
    """Enter the trial in TensorBoard's HParams tab, unless it is there already.

    Only what it is, not what the tab shall show: TensorBoard takes that from whichever run it finds it in first, so a
    report alone says it (`report.board`), knowing the whole grid; until then all keys and tags are columns. Lightning's
    `log_hyperparams` would log a value along with it, a stray point before there is a metric.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    params = flat_hparams(config)
    logger.hparams.update(params)  # for the hparams.yaml that the logger writes beside its events
    if not fresh:
        return
    start = SessionStartInfo(start_time_secs=time.time())
    for key, value in params.items():
        kind = "bool_value" if isinstance(value, bool) else "string_value" if isinstance(value, str) else "number_value"
        setattr(start.hparams[key], kind, value)
    about = metadata.create_summary_metadata(HParamsPluginData(session_start_info=start))
    entry = Summary.Value(tag=metadata.SESSION_START_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
    logger.experiment._get_file_writer().add_summary(Summary(value=[entry]))


def hparams_metrics(bytes_per_token: float | None) -> tuple[str, str]:
    """The last val/loss, and val/bpb or, on a task, val/accuracy, under tags of their own: one value a trial."""
    return "hp/loss", "hp/accuracy" if bytes_per_token is None else "hp/bpb"
