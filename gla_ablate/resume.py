"""Going on with an unfinished trial where its last checkpoint stands, as if it had never stopped.

`checkpoints/last.ckpt` is Lightning's, with what this module adds under its callback: the states of the random
generators, the seconds that went by, and how long each log was. A trial that goes on first cuts its logs back to that
length, so that no step is in them twice. The file is replaced in one step, and loading it runs no code from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gla_ablate.config import TrainerConfig
from gla_ablate.experiment import NOT_IDENTITY
from gla_ablate.interruption import Interruption
from gla_ablate.module import AblationModule
from gla_ablate.status import Status, set_aside

FORMAT = 1  # of what `Checkpoints` adds
KEY = "gla_ablate.checkpoints"


class TimeIsUp(Exception):
    """`trainer.max_time` is over, and the checkpoint saved."""


class Unusable(Exception):
    """A checkpoint that can't be gone on from, with the reason."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step: killed while it writes, or on a full disk, the one before is still there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


class Checkpoints(L.Callback):
    """Saves `last.ckpt` after each validation, and before the trial ends: as `interruption` asks it to, or since its
    time is up.

    Has to be the last callback: what the others log after a validation belongs to what it saves.
    """

    def __init__(self, folder: Path, trainer: TrainerConfig, interruption: Interruption, status: Status) -> None:
        self.folder, self.interruption, self.status = folder, interruption, status
        self.every, self.max_time = trainer.val_every, math.inf if trainer.max_time is None else trainer.max_time
        self.began = time.monotonic()
        self._generators: dict[str, Any] | None = None
        self._logs: dict[str, int] = {}
        self._complete = False

    @property
    def state_key(self) -> str:
        return KEY

    def save(self, trainer: L.Trainer, complete: bool = False) -> None:
        """`complete`: nothing is left to do but the result."""
        self._complete = complete
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        self._logs = {str(path.relative_to(self.folder)): path.stat().st_size for path in logs(self.folder)}
        trainer.save_checkpoint(last(self.folder))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.interruption.install()  # in place of Lightning's handler, which would break a validation off
        self.restore_generators()  # not before: a loader that starts draws from one of them

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.interruption.install()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.save(trainer)
            self.end(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        # a step that a validation follows is saved after it: Lightning would leave the validation out
        if (self.interruption.asked or self.time_is_up()) and trainer.global_step % self.every:
            self.save(trainer)
            self.end(trainer)

    def time_is_up(self) -> bool:
        return time.monotonic() - self.began >= self.max_time

    def end(self, trainer: L.Trainer) -> None:
        """Where it is asked for. The last step's work is worth more than the time."""
        self.interruption.heed()
        if self.time_is_up() and trainer.global_step < trainer.max_steps:
            raise TimeIsUp(f"{self.max_time:g} s were over at step {trainer.global_step} of {trainer.max_steps}")

    def restore_generators(self) -> None:
        """Once, as the checkpoint has them, if the trial goes on from one."""
        if self._generators is not None:
            restore_generators(self._generators)
            self._generators = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "logs": self._logs,
            "generators": generators(),
            "seconds": self.status.seconds,
            "complete": self._complete,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generators = state["generators"]


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def logs(folder: Path) -> list[Path]:
    """What grows while a trial runs, and must hold no step twice."""
    return [folder / "metrics.csv", *sorted((folder / "tensorboard").glob("events.*"))]


def seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generators() -> dict[str, Any]:
    """The states of all random generators, as what a checkpoint may hold."""
    _, key, position, *gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(key, dtype=np.int64)), position, *gauss],
        "python": list(random.getstate()),
    }


def restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    key, *rest = states["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a trial goes on."""

    step: int
    seconds: float  # that went by before
    complete: bool  # nothing is left to do but the result


def take_up(folder: Path, module: AblationModule) -> Point | None:
    """Bring the folder to where its last checkpoint was saved, and say where that is.

    None, and nothing of an earlier attempt left, if there is no checkpoint; also if it can't be used, which is said and
    the file set aside.
    """
    for part in (folder / "checkpoints").glob(".last.ckpt.*"):  # of a process that was killed
        part.unlink()
    if last(folder).exists():
        try:
            checkpoint = usable(folder, module)
        except Unusable as error:
            print(f"{set_aside(last(folder))}: set aside, since {error}; starting from step 0", flush=True)
        else:
            own = checkpoint["callbacks"][KEY]
            cut_back(folder, own["logs"])
            return Point(checkpoint["global_step"], own["seconds"], own["complete"])
    remove_attempt(folder)
    return None


def usable(folder: Path, module: AblationModule) -> dict[str, Any]:
    """The checkpoint of `folder`, if `module` can be taken to where it stands. Raises `Unusable`."""
    try:
        checkpoint = torch.load(last(folder), map_location="cpu", weights_only=True, mmap=True)
        own = checkpoint["callbacks"][KEY]
        written, known = own["format"], set(own) >= {"logs", "generators", "seconds", "complete"}
        values, _ = checkpoint["config"], checkpoint["global_step"]
        weights = {name: x.shape for name, x in checkpoint["state_dict"].items()}
    except Exception as error:  # of any kind: whatever the bytes make of the reader
        raise Unusable(f"it can't be read ({type(error).__name__})") from error
    if written != FORMAT or not known:
        raise Unusable(f"its format is {written}, not {FORMAT}")
    if lasting(values) != lasting(dataclasses.asdict(module.config)):
        raise Unusable("it is of another configuration")
    if weights != {name: x.shape for name, x in module.state_dict().items()}:
        raise Unusable("its weights have other names or shapes")
    for name, size in own["logs"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            raise Unusable(f"{name} is shorter than it was")
    return checkpoint


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration, flat, but for what may change while a trial is under way."""
    flat = {f"{part}.{key}": x for part, value in values.items() if isinstance(value, dict) for key, x in value.items()}
    flat |= {part: value for part, value in values.items() if not isinstance(value, dict)}
    return {key: x for key, x in flat.items() if key == "seed" or key not in NOT_IDENTITY}


def cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Take from the logs what was written after they had these sizes."""
    for path in logs(folder):
        size = sizes.get(str(path.relative_to(folder)))
        if size is None:
            path.unlink(missing_ok=True)
        else:
            os.truncate(path, size)


def remove_attempt(folder: Path) -> None:
    """Remove what an attempt recorded that can't be gone on from: its curves would mix with the new ones."""
    for name in ("metrics.csv", "stamp.json", "result.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    last(folder).unlink(missing_ok=True)
