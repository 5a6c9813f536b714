"""Going on with an unfinished trial where its last checkpoint stands, as if it had never stopped.

`checkpoints/last.ckpt` is Lightning's, with what this module adds under its callback: the states of the random
generators, the seconds that went by, and how long each log was. A trial that goes on first cuts its logs back to that
length, so that no step is in them twice. The file is replaced in one step, and loading it runs no code from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gla_ablate import curves
from gla_ablate.checkpoint import Unusable, last, read_checkpoint
from gla_ablate.config import TrainerConfig, without_unused
from gla_ablate.distributed import Group
from gla_ablate.experiment import NOT_IDENTITY
from gla_ablate.interruption import Interruption
from gla_ablate.lengths import POSITIONS
from gla_ablate.module import AblationModule
from gla_ablate.status import Status, read_json, set_aside, sync
from gla_ablate.tracking import ends_step

FORMAT = 1  # of what `Checkpoints` adds
KEY = "gla_ablate.checkpoints"


class TimeIsUp(Exception):
    """`trainer.max_time` is over, and the checkpoint saved."""


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
            sync(path.parent)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


class Checkpoints(L.Callback):
    """Saves `last.ckpt` after each validation, and before the trial ends: as `interruption` asks it to, or since its
    time is up.

    Has to be the last callback: what the others log after a validation belongs to what it saves.
    """

    def __init__(
        self, folder: Path, trainer: TrainerConfig, interruption: Interruption, status: Status, group: Group
    ) -> None:
        self.group = group
        self.folder, self.interruption, self.status = folder, interruption, status
        self.every, self.max_time = trainer.val_every, math.inf if trainer.max_time is None else trainer.max_time
        self.began = time.monotonic()
        self._generators: dict[str, Any] | None = None
        self._others: list[Any] = []  # of the other processes
        self._logs: dict[str, Any] = {}
        self._complete = False

    @property
    def state_key(self) -> str:
        return KEY

    def save(self, trainer: L.Trainer, complete: bool = False) -> None:
        """`complete`: nothing is left to do but the result."""
        self._complete = complete
        self._others = self.group.all(generators())[1:]
        if trainer.is_global_zero:
            self._note_logs(trainer)
        trainer.save_checkpoint(last(self.folder))  # of all processes, by the first

    def _note_logs(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        for path in (self.folder / "metrics.csv", *events(self.folder)):
            sync(path)
        self._logs = {
            "metrics": (self.folder / "metrics.csv").stat().st_size,
            "events": [path.stat().st_size for path in events(self.folder)],
        }

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.interruption.install()  # in place of Lightning's handler, which would break a validation off
        self.restore_generators()  # not before: a loader that starts draws from one of them

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.interruption.install()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.save(trainer)
            self.end(trainer, *self.asked())

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        # a step that a validation follows is saved after it: Lightning would leave the validation out
        if trainer.global_step % self.every:
            interrupted, time_is_up = self.asked()
            if interrupted or time_is_up:
                self.save(trainer)
                self.end(trainer, interrupted, time_is_up)

    def asked(self) -> tuple[str | None, bool]:
        """The signal that asks the trial to end, and whether its time is up: by any of its processes, so that all know
        the same. Each step of several then waits for the slowest host and some tenths of a millisecond, for no device.
        """
        own = self.interruption.asked
        number, up = self.group.largest(
            signal.Signals[own] if own else 0, time.monotonic() - self.began >= self.max_time
        )
        return (signal.Signals(int(number)).name if number else None), bool(up)

    def end(self, trainer: L.Trainer, interrupted: str | None, time_is_up: bool) -> None:
        """Raise what ends the trial here, if anything does; its time doesn't, once all steps are done."""
        if interrupted:
            self.interruption.heed(interrupted)
        if time_is_up and trainer.global_step < trainer.max_steps:
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
        } | ({"others": self._others} if self._others else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        every = [state["generators"], *state.get("others", [])]
        self._generators = every[self.group.rank] if self.group.rank < len(every) else None  # those stay as seeded


def events(folder: Path) -> list[Path]:
    """TensorBoard's files in the order in which it reads them: of earlier processes (see `cut_back`), then of this one,
    which begins another for a validation of its own at the end."""
    return sorted((folder / "tensorboard").glob("events.*"))


def seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generators() -> dict[str, Any]:
    """The states of all random generators, as what a checkpoint may hold."""
    _, key, position, *gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process's GPU alone
        "numpy": [torch.from_numpy(np.asarray(key, dtype=np.int64)), position, *gauss],
        "python": list(random.getstate()),
    }


def restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for state in states["cuda"][:1] if torch.cuda.is_available() else []:
        torch.cuda.set_rng_state(state)
    key, *rest = states["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a trial goes on."""

    step: int
    loss: float | None  # that was logged last
    seconds: float  # that went by before
    complete: bool  # nothing is left to do but the result


def take_up(folder: Path, module: AblationModule, data: dict[str, Any]) -> Point | None:
    """Bring the folder to where its last checkpoint was saved, and say where that is.

    None, and nothing of an earlier attempt left, if there is no checkpoint; also if it can't be used with this `module`
    and `data` (a source's stamp), which is said and the file set aside. A link, which may lead anywhere, is removed.
    """
    own_files = ("metrics.csv", POSITIONS, "stamp.json", "result.json", "tensorboard", "checkpoints")
    for path in (*(folder / name for name in own_files), *folder.glob("tensorboard/*"), *folder.glob("checkpoints/*")):
        if path.is_symlink():
            path.unlink()
    for part in (folder / "checkpoints").glob(".last.ckpt.*"):  # of a process that was killed
        part.unlink()
    if last(folder).exists():
        try:
            checkpoint = usable(folder, module, data)
        except Unusable as error:
            print(f"{set_aside(last(folder))}: set aside, since {error}; starting from step 0", flush=True)
        else:
            own = checkpoint["callbacks"][KEY]
            cut_back(folder, own["logs"])
            loss = checkpoint["callbacks"]["TrainingLog"]["loss"]
            return Point(checkpoint["global_step"], loss, own["seconds"], own["complete"])
    remove_attempt(folder)
    return None


def usable(folder: Path, module: AblationModule, data: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of `folder`, if `module` can be taken to where it stands. Raises `Unusable`."""
    try:
        checkpoint = read_checkpoint(last(folder))
        own = checkpoint["callbacks"][KEY]
        if own["format"] != FORMAT:
            raise Unusable(f"its format is {own['format']}, not {FORMAT}")
        if lasting(checkpoint["config"]) != lasting(dataclasses.asdict(module.config)):
            raise Unusable("it is of another configuration")
        shapes = {name: x.shape for name, x in checkpoint["state_dict"].items()}
        if shapes != {name: x.shape for name, x in module.state_dict().items()}:
            raise Unusable("its weights have other names or shapes")
        missing = {"loops", "optimizer_states", "lr_schedulers", "DataModule"} - set(checkpoint)
        missing |= {"torch", "cuda", "numpy", "python"} - set(own["generators"])
        missing |= {"tokens", "loss", "losses"} - set(checkpoint["callbacks"]["TrainingLog"])
        counts = [checkpoint["global_step"], own["logs"]["metrics"], *own["logs"]["events"]]
        if missing or len(checkpoint["optimizer_states"]) != 1 or any(type(n) is not int for n in counts):
            raise Unusable("something is missing in it")
        float(own["seconds"]), bool(own["complete"])
        stamped = (read_json(folder / "stamp.json") or {}).get("data", data)
        if json.loads(json.dumps(data)) != json.loads(json.dumps(stamped)):
            raise Unusable("the data have changed since")
        check_logs(folder, own["logs"])
    except Unusable:
        raise
    except Exception as error:  # of any kind: whatever the bytes make of their reader
        raise Unusable(f"it can't be read ({type(error).__name__})") from error
    return checkpoint


def check_logs(folder: Path, sizes: dict[str, Any]) -> None:
    """That the logs hold what they held. Raises `Unusable`."""
    paths, wanted = [folder / "metrics.csv", *events(folder)], [sizes["metrics"], *sizes["events"]]
    if len(paths) < len(wanted):
        raise Unusable("an event file is missing")
    for path, size in zip(paths, wanted, strict=False):
        if not path.is_file() or path.stat().st_size < size:
            raise Unusable(f"{path.name} is shorter than it was")
    with (folder / "metrics.csv").open("rb") as file:
        text = file.read(sizes["metrics"]).decode(errors="replace")
        if curves.whole_lines(text) != text or curves.read(text) is None:
            raise Unusable("metrics.csv is damaged")


def cut_back(folder: Path, sizes: dict[str, Any]) -> None:
    """Take from the logs what was written after they had these sizes.

    TensorBoard reads event files in the order of their names, which begin with the time: those that are here get names
    that come before any that will be, whatever the clocks say.
    """
    os.truncate(folder / "metrics.csv", sizes["metrics"])
    present = events(folder)
    for path in present[len(sizes["events"]) :]:
        path.unlink()
    for i, (path, size) in enumerate(zip(present, sizes["events"], strict=False)):
        os.truncate(path, size)
        path.rename(path.with_name(f"events.out.tfevents.{i:010}"))


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration, flat, but for what may change while a trial is under way."""
    values = without_unused(values)
    flat = {f"{part}.{key}": x for part, value in values.items() if isinstance(value, dict) for key, x in value.items()}
    flat |= {part: value for part, value in values.items() if not isinstance(value, dict)}
    return {key: x for key, x in flat.items() if key == "seed" or key not in NOT_IDENTITY}


def remove_attempt(folder: Path) -> None:
    """Remove what an attempt recorded that can't be gone on from: its curves would mix with the new ones."""
    for name in ("metrics.csv", POSITIONS, "stamp.json", "result.json"):
        if (folder / name).is_dir():
            set_aside(folder / name)
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    last(folder).unlink(missing_ok=True)
