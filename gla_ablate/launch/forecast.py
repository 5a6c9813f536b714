"""How long trials will take, judged by what others took: seconds go with the floating-point operations of training."""

from __future__ import annotations

import functools
import heapq
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from gla_ablate.config import ModelConfig, to_dict
from gla_ablate.data import build_source
from gla_ablate.experiment import Trial
from gla_ablate.launch.state import USUAL, State
from gla_ablate.model import flops_per_token
from gla_ablate.status import read_json

NEIGHBOURS = 5  # trials of nearly as large a step that an estimate is the median of
ALIKE = 4.0  # times larger or smaller a step may be to judge by: below it's the overhead that counts, above the machine


def tokens(trial: Trial) -> int:
    """That it trains on."""
    return trial.config.trainer.max_steps * trial.config.data["batch_size"] * trial.config.data["seq_len"]


def rates(trials: Iterable[Trial]) -> dict[str, float]:
    """`flops_per_token` of each trial by its id, computed once for trials that differ in other things."""
    models: dict[str, ModelConfig] = {}

    @functools.cache
    def flops(key: str, vocab_size: int, seq_len: int, labelled_share: float) -> float:
        return flops_per_token(models[key], vocab_size, seq_len, labelled_share)

    found = {}
    for trial in trials:
        config = trial.config
        key = json.dumps(to_dict(config)["model"])
        models[key] = config.model
        source = build_source(config.data)
        found[trial.id] = flops(key, source.vocab_size, source.seq_len, source.labelled_share)
    return found


def makespan(running: Iterable[float], queued: Iterable[float], slots: int) -> float:
    """Seconds until all is done, where each of `queued` begins as soon as one of `slots` is free."""
    ends = list(running)
    ends += [0.0] * (slots - len(ends))
    heapq.heapify(ends)
    for seconds in queued:
        heapq.heappush(ends, heapq.heappop(ends) + seconds)
    return max(ends, default=0.0)


class Forecast:
    """Of a grid that is running, by its own trials so far."""

    def __init__(self, trials: list[Trial], slots: int) -> None:
        rate = rates(trials)
        self.work = {trial.id: rate[trial.id] * tokens(trial) for trial in trials}
        self.slots = slots

    def of_trial(self, state: State) -> float | None:
        """Seconds that a running trial still takes, at the pace of its last attempt; None before its second step."""
        if state.status != "running" or state.step <= state.first_step:
            return None
        return state.trained / (state.step - state.first_step) * max(state.max_steps - state.step, 0)

    def of_grid(self, states: Mapping[str, State]) -> float | None:
        """Seconds until no trial runs or waits; None before any has made two steps."""
        paced = {id: s for id, s in states.items() if s.setup is not None and 0 <= s.first_step < s.step <= s.max_steps}
        done = sum(self.work[id] * (s.step - s.first_step) / s.max_steps for id, s in paced.items())
        if not done:
            return None
        pace = sum(s.trained for s in paced.values()) / done
        setup = median(s.setup or 0.0 for s in paced.values())
        running, queued = [], []
        for id, state in states.items():
            whole = setup + self.work[id] * pace
            if state.status == "queued":
                queued.append(whole)
            elif state.status == "running":
                left = self.of_trial(state)
                running.append(max(whole - state.seconds, 0.0) if left is None else left)
        return makespan(running, queued, self.slots)


@dataclass(frozen=True)
class Past:
    """What a finished trial took: seconds until its first step was done, and from there on for each operation."""

    step: float  # operations
    setup: float
    pace: float


def past(out: Path, device: str) -> list[Past]:
    """Of the trials under the folder of all experiments that finished on `device`."""
    found = []
    for file in out.glob("*/*/result.json"):
        result = read_json(file) or {}
        numbers = [result.get(name) for name in ("flops_per_token", "tokens", "steps", "seconds", "setup")]
        known = [float(x) for x in numbers if isinstance(x, int | float) and 0 < x < USUAL]
        if result.get("device") == device and len(known) == len(numbers):
            flops, count, steps, seconds, setup = known
            found.append(Past(flops * count / steps, setup, max(seconds - setup, 0.0) / (flops * count)))
    return found


def expected(step: float, steps: int, known: list[Past]) -> float | None:
    """Seconds for so many steps of so many operations, by those of the `known` trials that are nearest in that; None
    where none is near."""
    alike = [p for p in known if 1 / ALIKE <= p.step / step <= ALIKE]
    nearest = heapq.nsmallest(NEIGHBOURS, alike, key=lambda p: abs(math.log(p.step / step)))
    if not nearest:
        return None
    return median(p.setup for p in nearest) + steps * step * median(p.pace for p in nearest)
