"""Train one trial in this process and record it in its folder: the part of a trial that needs Lightning."""

from __future__ import annotations

import logging
import resource
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from gla_ablate.config import Config
from gla_ablate.data.module import DataModule
from gla_ablate.errors import ConfigError
from gla_ablate.model import count_parameters, flops_per_token, state_size
from gla_ablate.module import AblationModule
from gla_ablate.ops import resolve_backend
from gla_ablate.stamp import device_name, stamp
from gla_ablate.status import Status, write_json
from gla_ablate.tracking import GateStatistics, MetricsCSV, TrainingLog, declare_hparams


def fit(config: Config, folder: Path, status: Status) -> dict[str, Any]:
    """Train, validate and return what `result.json` shall hold.

    Writes `stamp.json`, `metrics.csv`, `tensorboard/` and `checkpoints/last.ckpt`, the last after each validation.
    Raises `ConfigError` for a precision or backend that the device lacks, `NonFinite` for a loss that isn't finite, and
    whatever a gate or a data source raises.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hints would fill half the trial's log
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # reading packed rows costs less than a worker
    warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer`.*")  # as intended: the module's is used
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.trainer.precision, device)
    try:
        backend = resolve_backend(config.model.backend, device)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    status.max_steps = config.trainer.max_steps

    data = DataModule(config.data, config.seed)
    data.prepare_data()
    identity = data.source.stamp()
    write_json(folder / "stamp.json", stamp(device, backend, precision, identity))
    torch.manual_seed(config.seed)  # for a gate that draws while it runs: weights and batches have streams of their own
    module = AblationModule(config)

    csv = MetricsCSV(folder / "metrics.csv")
    tensorboard = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False, flush_secs=10)
    declare_hparams(tensorboard, config)
    log = TrainingLog(config.trainer.log_every, status.progress)
    checkpoint = ModelCheckpoint(
        folder / "checkpoints",
        filename="last",
        every_n_epochs=1,
        save_on_train_epoch_end=False,  # after each validation instead
        auto_insert_metric_name=False,
        enable_version_counter=False,  # one file, replaced
    )
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]  # checked by resolve_precision
        max_steps=config.trainer.max_steps,
        val_check_interval=config.trainer.val_every,
        check_val_every_n_epoch=None,  # count steps, not epochs
        num_sanity_val_steps=0,
        gradient_clip_val=config.optim.grad_clip,
        logger=[csv, tensorboard],
        callbacks=[log, GateStatistics(config.data["seq_len"]), checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if config.trainer.max_steps % config.trainer.val_every:  # else the last step has been validated and saved
        trainer.validate(module, data, verbose=False)
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    tensorboard.experiment.flush()

    vocab_size = data.source.vocab_size
    return {
        "metrics": csv.last,
        "steps": trainer.global_step,
        "tokens": log.tokens,
        "seconds": round(status.seconds, 3),
        "params": count_parameters(config.model, vocab_size),
        "state_size": state_size(config.model),
        "flops_per_token": flops_per_token(config.model, vocab_size, config.data["seq_len"]),
        "tokens_per_s": log.tokens_per_s,
        "peak_mem_mb": peak_memory(device),
        "backend": backend,
        "device": device_name(device),
        "data": identity,
    }


def resolve_precision(precision: str, device: torch.device) -> str:
    """Lightning's name for `trainer.precision` on `device`; "auto" is bf16-mixed on a GPU that computes in bf16, else
    32-true. Raises `ConfigError` for bf16-mixed on a GPU that would emulate it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16-mixed" if has_bf16 else "32-true"
    if precision == "bf16-mixed" and device.type == "cuda" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"trainer.precision: got 'bf16-mixed', which {name} doesn't compute in; takes '32-true' or 'auto'"
        )
    return precision


def peak_memory(device: torch.device) -> float:
    """MiB: the most that torch held on the GPU, or the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
