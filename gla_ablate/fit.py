"""Train one trial in this process and record it in its folder: the part of a trial that needs Lightning."""

from __future__ import annotations

import contextlib
import logging
import resource
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment

from gla_ablate.checkpoint import last
from gla_ablate.config import Config
from gla_ablate.data.module import DataModule
from gla_ablate.distributed import Group
from gla_ablate.errors import ConfigError
from gla_ablate.gate_statistics import GateStatistics
from gla_ablate.interruption import Interruption
from gla_ablate.lengths import LengthEvaluation
from gla_ablate.model import count_parameters, flops_per_token, plugin_sha256, state_size
from gla_ablate.module import AblationModule
from gla_ablate.ops import resolve_backend
from gla_ablate.resume import AtomicCheckpointIO, Checkpoints, Point, seed_generators, take_up
from gla_ablate.sharding import Connected, strategy
from gla_ablate.stamp import device_name, has_bf16, stamp
from gla_ablate.status import Status, read_json, write_json
from gla_ablate.tracking import MetricsCSV, TrainingLog, declare_hparams
from gla_ablate.utilisation import peak_flops


def fit(
    config: Config, folder: Path, status: Status, interruption: Interruption, group: Group | None = None
) -> dict[str, Any]:
    """Train, validate and return what `result.json` shall hold.

    Writes `stamp.json`, `metrics.csv`, `tensorboard/` and `checkpoints/last.ckpt`, the last after each validation and
    when interrupted; goes on from it if there is one. Raises `Interrupted` as `interruption` asks for it, `ConfigError`
    for a precision or backend that the device lacks, `NonFinite` for a loss that isn't finite, `TimeIsUp`, and whatever
    a gate or a data source raises. Of several processes, `group`, each calls this, and the first alone writes.
    """
    group = group or Group()
    several, first = group.world > 1, group.rank == 0
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hints would fill half the trial's log
    device = torch.device("cuda", group.local) if torch.cuda.is_available() else torch.device("cpu")
    precision = resolve_precision(config.trainer.precision, device)
    try:
        backend = resolve_backend(config.model.backend, device)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    status.max_steps = config.trainer.max_steps

    data = DataModule(
        config.data, config.seed, accumulate=config.trainer.accumulate, rank=group.rank, world=group.world
    )
    data.prepare_data()
    if config.eval.lengths:
        data.source.prepare_longer(config.eval.lengths[-1])
    cost = flops_per_token(config.model, data.source.vocab_size, data.source.seq_len, data.source.labelled_share)
    rate = peak_flops(precision, device) if first else None
    peak_speed = config.trainer.processes * rate / cost if rate else None
    # For a gate that draws while it runs: weights and batches have streams of their own.
    seed_generators(config.seed + group.rank)
    module = AblationModule(config)
    point, identity, loggers = None, {}, []
    if first:
        identity = data.source.stamp()
        point = take_up(folder, module, identity)
        made = stamp(folder, device, backend, precision, identity, plugin_sha256(config.model.gate["name"]))
        write_stamp(folder, made | of_several(config, made["device"]), point)
        csv = MetricsCSV(folder / "metrics.csv", go_on=point is not None)
        tensorboard = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False, flush_secs=10)
        declare_hparams(tensorboard, config, fresh=point is None)
        loggers = [csv, tensorboard]
    point = group.from_first(point)
    log = TrainingLog(config.trainer.log_every, status.progress, data.waited, peak_speed)
    checkpoints = Checkpoints(folder, config.trainer, interruption, status, group)
    if point:
        status.before, status.step, status.loss = point.seconds, point.step, point.loss
        if first:
            print(f"going on from step {point.step}", flush=True)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy(config.trainer) if several else "auto",
        use_distributed_sampler=False,  # a process's batches are its share already
        # Not Lightning's bf16-true, which would take a gate's parameters and constants along, and keep no masters.
        precision="bf16-mixed" if precision == "bf16-true" else precision,  # type: ignore[arg-type]  # as resolved
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.trainer.accumulate,
        val_check_interval=config.trainer.val_every * config.trainer.accumulate,  # micro-batches
        check_val_every_n_epoch=None,  # count those, not epochs
        num_sanity_val_steps=0,
        gradient_clip_val=config.optim.grad_clip,
        logger=loggers,
        callbacks=[
            log,
            GateStatistics(config.data["seq_len"]),
            *([LengthEvaluation(config.eval.lengths, data, folder)] if config.eval.lengths else []),
            checkpoints,
        ],
        # A job of SLURM is no environment of Lightning's: it would count SLURM's tasks, requeue the job, and go on from
        # an hpc_ckpt that lies about; the launcher does what is to be done.
        plugins=[AtomicCheckpointIO(), Connected(group) if several else LightningEnvironment()],
        default_root_dir=folder,
        enable_checkpointing=False,  # by Lightning's own callback
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if several:
        # Lightning's handler of SIGTERM would call the other processes from in between whatever they all are at.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    with interruption.deferred(), contextlib.closing(data):
        trainer.fit(module, data, ckpt_path=last(folder) if point else None, weights_only=True)
        if config.trainer.max_steps % config.trainer.val_every and not (point and point.complete):
            checkpoints.restore_generators()  # if no step was left to train
            trainer.validate(module, data, verbose=False)  # else the last step has been validated and saved
            checkpoints.save(trainer, complete=True)
    (peak,) = group.largest(peak_memory(device))
    if not first:
        return {}
    tensorboard.experiment.flush()
    csv.close()
    vocab_size = data.source.vocab_size
    result: dict[str, Any] = {
        "metrics": csv.last,
        "steps": trainer.global_step,
        "tokens": log.tokens,
        "seconds": round(status.seconds, 3),
        "setup": status.setup,
        "params": count_parameters(config.model, vocab_size),
        "state_size": state_size(config.model, config.data["seq_len"]),
        "flops_per_token": cost,
        "tokens_per_s": log.tokens_per_s,
        "mfu": log.tokens_per_s / peak_speed if peak_speed else None,
        "matrix_flops_per_s": rate,
        "peak_mem_mb": peak,
        "backend": backend,
        "compiled": module.compiled,
        "recompute": module.recompute,
        "device": device_name(device),
        "data": identity,
    }
    return result | of_several(config, result["device"])


def of_several(config: Config, device: str) -> dict[str, Any]:
    """What a stamp and a result tell of a trial on several devices, each named `device`; of one, nothing."""
    count = config.trainer.processes
    if count == 1:
        return {}
    name = "ddp" if config.trainer.strategy == "auto" else config.trainer.strategy
    return {"device": f"{count} × {device}", "devices": count, "strategy": name}


def write_stamp(folder: Path, made: dict[str, Any], point: Point | None) -> None:
    """`stamp.json`: of the process that began the trial and, under "resumed", of those that went on with it."""
    before = read_json(folder / "stamp.json") if point else None
    if point and before:
        earlier = before.get("resumed")
        earlier = earlier if isinstance(earlier, list) else []
        made = before | {"resumed": [*earlier, {"step": point.step, **made}]}
    write_json(folder / "stamp.json", made)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`trainer.precision` on `device`, where "auto" is bf16-mixed on a GPU that computes in bf16, else 32-true. Raises
    `ConfigError` for bf16 on a GPU that would emulate it."""
    if precision == "auto":
        return "bf16-mixed" if has_bf16(device.type) else "32-true"
    if precision != "32-true" and device.type == "cuda" and not has_bf16(device.type):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"trainer.precision: got {precision!r}, which {name} doesn't compute in; takes '32-true' or 'auto'"
        )
    return precision


def peak_memory(device: torch.device) -> float:
    """MiB: the most that torch held on the GPU, or the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
