"""What a token costs when a model decodes: time and memory against the tokens that came before it.

    python benchmarks/decoding.py --out decoding.json --plot decoding.png       # the paper's 340M model; one GPU
    python benchmarks/decoding.py --mixers gla --batches 1 64                   # without the KV cache of softmax layers
    python benchmarks/decoding.py --dim 64 --layers 2 --heads 2 --contexts 256 1024 --batches 1     # also on a CPU

A row of the table is printed, and the JSON file replaced, as soon as it is measured. No prompt of that length is read:
the cache of a model that has read one is made, and filled with random numbers, which cost what real ones do.

ms a token    median of `triton.testing.do_bench` (on a CPU: of five calls or a second) of one step of the whole model,
              on a GPU with bf16 projections under bf16 autocast, kernel by kernel, with no sampling; then the same
              captured as a CUDA graph, which leaves out the host that launches: `run.py --generate` does that where no
              layer is softmax or has rotary positions
tokens a s    of all sequences of the batch together, captured where that can be
cache MiB     what is carried from token to token: states, or keys and values
peak MiB      of GPU memory in a step, weights and cache included

A row whose cache doesn't fit in --memory (default: most of what is free) isn't measured, and says what it needs.
`--budget` is asked between rows. Exit codes: 0; 1 if a row failed; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure
import table
from rivals import reason
from table import header, line, number, save
from torch import Tensor

from gla_ablate.config import ModelConfig, fill
from gla_ablate.errors import ConfigError
from gla_ablate.model import LanguageModel, build_model, check_model
from gla_ablate.replay import cast_projections

CONTEXTS = [1024 << i for i in range(9)]  # 1k … 256k
COLUMNS = ("mixer", "batch", "context", "ms a token", "replayed", "tokens a s", "cache MiB", "peak MiB")
SHARE = 0.8  # of the free memory, for the cache


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=["gla", "softmax"], metavar="NAME", help="gla, softmax")
    parser.add_argument("--gate", default="data_dependent", metavar="NAME", help="of gla layers")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, metavar="T", help="tokens before")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], metavar="B")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="N")
    parser.add_argument("--memory", type=float, metavar="GIB", help="that a cache may take")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the rows go")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where the figure goes")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="after which no row begins"
    )
    options = parser.parse_args(given)
    for name in ("contexts", "batches"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name}: got {min(getattr(options, name))}, takes whole numbers from 1")
    if options.vocabulary < 1:
        parser.error(f"--vocabulary: got {options.vocabulary}, takes a whole number from 1")
    try:
        options.models = {mixer: config_of(mixer, options) for mixer in options.mixers}
    except ConfigError as error:
        parser.error(str(error))
    return options


def config_of(mixer: str, options: argparse.Namespace) -> ModelConfig:
    """The model with that mixer in every layer. Raises `ConfigError` for one that there isn't."""
    given = {name: getattr(options, name) for name in ("dim", "layers", "heads")}
    given |= {"ffn_multiple": 256 if options.dim >= 1024 else 32, "gate": {"name": options.gate}, "mixer": mixer}
    return check_model(fill(ModelConfig, given, "model."))


def run(options: argparse.Namespace, record: dict[str, Any], deadline: float = float("inf")) -> bool:
    """Print and record a row for each mixer, batch and context. True if none failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(header(COLUMNS), flush=True)
    good = True
    for mixer, config in options.models.items():
        model = build_model(config, options.vocabulary).to(device).eval()
        if device == "cuda":
            cast_projections(model, torch.bfloat16)
        for batch, context in itertools.product(options.batches, options.contexts):
            row: dict[str, Any] = {"mixer": mixer, "batch": batch, "context": context, "note": ""}
            row["ms"] = row["replay_ms"] = row["peak_mib"] = None
            if time.monotonic() > deadline:
                row["note"] = "left out: --budget is spent"
            else:
                try:
                    fill_in(row, model, options.memory)
                except Exception as error:  # of any kind: it is the row's result, and the rest goes on
                    row["note"], good = f"failed: {reason(error)}", False
            record["rows"].append(row)
            save(options.out, record)
            print(render(row), flush=True)
        del model
    save(options.out, record)
    return good


@torch.no_grad()
def fill_in(row: dict[str, Any], model: LanguageModel, memory: float | None = None) -> None:
    """Measure a step of `model` after `row["context"]` tokens. Raises whatever it raises."""
    batch, context, device = row["batch"], row["context"], model.embedding.weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        needed = cache_bytes(model, batch, context + 1)
        row["cache_mib"] = needed / 2**20
        if needed > (free_bytes() * SHARE if memory is None else memory * 2**30):
            row["note"] = "not measured: the cache doesn't fit"
            return
        cache = model.new_cache(batch, context + 1)
        for x in held(cache):
            x.normal_()
        tokens = torch.randint(model.embedding.num_embeddings, (batch, 1), device=device)

        def step() -> Tensor:
            for layer in cache:
                layer.position = context  # which each step would move on, past what the cache holds
            return model(tokens, cache=cache)

        step()
        measure.warm(step)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        extra = measure.peak_bytes(step)
        row["peak_mib"] = None if extra is None else (before + extra) / 2**20
        row["ms"] = measure.median_ms(step)
        if device.type == "cuda":
            try:
                row["replay_ms"] = measure.replayed_ms(step)
            except RuntimeError as error:  # of a step that waits for the host
                row["uncaptured"] = reason(error)
                torch.cuda.synchronize()


def cache_bytes(model: LanguageModel, batch: int, length: int) -> int:
    """Of `model.new_cache(batch, length)`, from two small ones: a constant and a part that goes with the length."""
    one, two = (sum(x.nbytes for x in held(model.new_cache(1, n))) for n in (1, 2))
    return batch * (one + (two - one) * (length - 1))


def held(cache: Any) -> Iterator[Tensor]:
    """The tensors in it, whatever holds them."""
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, list | tuple | dict):
        for part in cache.values() if isinstance(cache, dict) else cache:
            yield from held(part)
    elif hasattr(cache, "__dict__"):
        yield from held(vars(cache))


def free_bytes() -> int:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def render(row: dict[str, Any]) -> str:
    fastest = row["replay_ms"] or row["ms"]
    speed = [row["note"] or number(row["ms"], ".3f"), number(row["replay_ms"], ".3f")]
    speed += [number(fastest and 1e3 * row["batch"] / fastest, ",.0f")]
    cache = row.get("cache_mib")
    memory = [number(cache, ",.3g" if cache and cache < 100 else ",.0f"), number(row["peak_mib"], ",.0f")]
    return line([row["mixer"], str(row["batch"]), f"{row['context']:,}", *speed, *memory])


def main() -> int:
    start = time.monotonic()
    options = arguments()
    if options.plot:
        import plot  # before anything is measured: it needs matplotlib
    record: dict[str, Any] = {"stamp": table.stamp(), "decoding": True, "rows": []}
    record["models"] = {mixer: dataclasses.asdict(config) for mixer, config in options.models.items()}
    record["vocabulary"] = options.vocabulary
    print(f"{record['stamp']['device']}, " + ", ".join(f"{k} {v}" for k, v in record["stamp"]["versions"].items() if v))
    good = run(options, record, start + options.budget)
    if options.plot:
        plot.write(record, options.plot)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
