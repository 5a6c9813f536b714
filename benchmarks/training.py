"""Whole training steps of a language model on one GPU, beside FLA's GLA and a compiled Llama of the same size.

    python benchmarks/training.py                                        # 340M at B16 T2048, B4 T8192, B1 T32768
    python benchmarks/training.py --sizes 1.3B --batches 8x2048 --models gla_ablate --profile --out training.json
    python benchmarks/training.py --models gla_ablate run.py --vocabulary 256    # the bare loop beside the whole runner
    python benchmarks/training.py --sizes tiny --batches 2x64 --device cpu   # that everything runs, no more

A step is forward, loss, backward, clipping to a norm of 1, AdamW (fused), in bf16 autocast with fp32 weights, on random
tokens. The columns:

first step s      building aside, what compiling and tuning take: the first step of the process at that size
step ms           median of `--steps` steps after `--warm`, by CUDA events (on a CPU by the clock)
tokens/s          B · T over it
peak MiB          most that PyTorch held during those steps
of the rate       `flops_per_token` · tokens/s over the rate of an 8192³ bf16 product, measured first (ours alone: the
                  count is this project's); of run.py what it says itself, `mfu`

--profile adds where the device's time goes, for each model, by kind of kernel, and what is left idle.

gla_ablate   this project's model as `run.py` trains it on a GPU: compiled, `trainer.recompute: elementwise`; "keeps
             all" with `none`, "by block" with `block`, "eager" with neither
run.py       a trial of this project: data, logging and all, 60 steps; its validation isn't timed, nor are the first ten
             steps. Its first step has all that comes before, data included; its peak is that of all it did. Its data
             are bytes: --vocabulary 256
fla          flash-linear-attention's `GLAForCausalLM`, as it comes
llama        transformers' `LlamaForCausalLM` with PyTorch's attention, `torch.compile`d whole

Exit codes: 0; 1 if a model of ours failed; 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rivals
import table
import whole_run

from gla_ablate.config import ModelConfig
from gla_ablate.data.corpus import ByteCorpus
from gla_ablate.model import build_model, flops_per_token
from gla_ablate.model.recompute import Recompute
from gla_ablate.model.shapes import check_model, ffn_width
from gla_ablate.ops.cross_entropy import linear_cross_entropy

VOCABULARY = 32_000
SIZES = {
    "tiny": ModelConfig(dim=64, layers=2, heads=2),
    "340M": ModelConfig(dim=1024, layers=24, heads=4),
    "1.3B": ModelConfig(dim=2048, layers=24, heads=4),
}
RUN = "run.py"
COLUMNS = ("size", "batch", "model", "parameters", "first step s", "step ms", "tokens/s", "peak MiB", "of the rate")
Loss = Callable[[Tensor], Tensor]  # tokens [B, T + 1] → the mean cross entropy of the last T
KINDS = {  # of kernels, by a part of their names; the first that fits
    "op": ("scan_kernel", "products_kernel", "prepare_kernel", "gradient_kernel", "scores_kernel", "survey_kernel",
           "states_kernel", "segments_kernel", "chunk_", "_attention", "fmha", "flash"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimiser": ("FusedAdam", "multi_tensor", "foreach", "lpnorm"),
    "loss": ("cross_entropy", "log_softmax", "logsumexp", "nll"),
    "norms and element-wise": ("triton_", "elementwise", "reduce", "norm", "swiglu", "silu"),
    "copies": ("Memcpy", "Memset", "copy"),
}  # fmt: skip


@dataclass
class Row:
    size: str
    batch: tuple[int, int]
    model: str
    parameters: int | None = None
    first_s: float | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    share: float | None = None
    profile: dict[str, float] | None = None  # ms a step
    data_wait_ms: float | None = None  # of a step
    note: str = ""


def ours(
    size: str, device: str, compiled: bool, recompute: Recompute, vocabulary: int = VOCABULARY
) -> tuple[nn.Module, Loss]:
    model = build_model(check_model(SIZES[size]), vocabulary).to(device)
    model.tune_training(compiled, recompute)

    def loss(tokens: Tensor) -> Tensor:
        states = model.hidden(tokens[:, :-1]).flatten(0, 1)
        return linear_cross_entropy(states, model.head.weight, tokens[:, 1:].flatten())

    return model, loss


def fla(size: str, device: str, vocabulary: int = VOCABULARY, layers: int | None = None) -> tuple[nn.Module, Loss]:
    from fla.models import GLAConfig, GLAForCausalLM

    config = SIZES[size]
    model = GLAForCausalLM(
        GLAConfig(
            hidden_size=config.dim,
            num_hidden_layers=layers or config.layers,
            num_heads=config.heads,
            vocab_size=vocabulary,
            expand_k=config.expand_k,
            expand_v=config.expand_v,
            intermediate_size=ffn_width(config),
        )
    ).to(device)
    return model, lambda tokens: shifted(model, tokens)


def llama(size: str, device: str, vocabulary: int = VOCABULARY) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = SIZES[size]
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=max(config.dim // 64, 1),
            intermediate_size=ffn_width(config),
            vocab_size=vocabulary,
            max_position_embeddings=2**16,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(device)
    compiled = torch.compile(model)
    return model, lambda tokens: shifted(compiled, tokens)


def shifted(model: Any, tokens: Tensor) -> Tensor:
    """The loss of a model that takes labels as long as its input and shifts them itself."""
    return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss


MODELS: dict[str, Callable[[str, str, int], tuple[nn.Module, Loss]]] = {
    "gla_ablate": lambda size, device, vocabulary: ours(size, device, True, "elementwise", vocabulary),
    "gla_ablate keeps all": lambda size, device, vocabulary: ours(size, device, True, "none", vocabulary),
    "gla_ablate by block": lambda size, device, vocabulary: ours(size, device, True, "block", vocabulary),
    "gla_ablate eager": lambda size, device, vocabulary: ours(size, device, False, "none", vocabulary),
    "fla": fla,
    "llama": llama,
}


def own(model: str) -> bool:
    return model.startswith("gla_ablate") or model == RUN


def stepper(
    model: nn.Module, loss: Loss, batch: tuple[int, int], device: str, vocabulary: int = VOCABULARY
) -> Callable[[], None]:
    """A training step on the same random tokens each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(vocabulary, (batch[0], batch[1] + 1), device=device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            value = loss(tokens)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], None], count: int, device: str) -> list[float]:
    """ms of each of so many steps; on a GPU without a wait between them."""
    if device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def fill(row: Row, options: argparse.Namespace, rate: float | None) -> None:
    device, vocabulary = options.device, options.vocabulary
    model, loss = MODELS[row.model](row.size, device, vocabulary)
    row.parameters = sum(p.numel() for p in model.parameters())
    step = stepper(model, loss, row.batch, device, vocabulary)
    settle(device)
    start = time.perf_counter()
    step()
    settle(device)
    row.first_s = time.perf_counter() - start
    for _ in range(options.warm):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row.step_ms = median(timed(step, options.steps, device))
    tokens = row.batch[0] * row.batch[1]
    row.tokens_per_s = 1e3 * tokens / row.step_ms
    if device == "cuda":
        row.peak_mib = torch.cuda.max_memory_allocated() / 2**20
    if rate and own(row.model):
        row.share = flops_per_token(SIZES[row.size], vocabulary, row.batch[1]) * row.tokens_per_s / rate
    if options.profile and device == "cuda":
        row.profile = profiled(step, row.step_ms)


def fill_from_run(row: Row, options: argparse.Namespace) -> None:
    """As `fill`, of a trial."""
    result = whole_run.result(SIZES[row.size], row.batch, options.device)
    row.parameters, row.first_s = result["params"], result["setup"]
    row.tokens_per_s, row.share = result["tokens_per_s"], result["mfu"]
    row.step_ms = 1e3 * row.batch[0] * row.batch[1] / row.tokens_per_s
    row.peak_mib = result["peak_mem_mb"] if options.device == "cuda" else None
    row.data_wait_ms = result["metrics"]["train/data_wait_ms"]


def profiled(step: Callable[[], None], step_ms: float, count: int = 5) -> dict[str, float]:
    """ms a step on the device by kind of kernel; "idle" is what a step takes beyond them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in seen.key_averages():
        found[kind_of(event.key)] += event.device_time_total / 1e3 / count
    return found | {"idle": max(step_ms - sum(found.values()), 0.0)}


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")


def render(row: Row) -> str:
    batch = f"B{row.batch[0]} T{row.batch[1]}"
    if row.note:
        return table.line([row.size, batch, row.model, row.note, *[""] * (len(COLUMNS) - 4)])
    cells = [table.number(x, form) for x, form in (
        (row.parameters, ","), (row.first_s, ".1f"), (row.step_ms, ".1f"), (row.tokens_per_s, ",.0f"),
        (row.peak_mib, ",.0f"), (row.share, ".0%"),
    )]  # fmt: skip
    return table.line([row.size, batch, row.model, *cells])


def pair(text: str) -> tuple[int, int]:
    """16x2048: sequences, tokens of each."""
    try:
        batch, length = map(int, text.split("x"))
    except ValueError:
        batch = length = 0
    if min(batch, length) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes sequences x tokens, such as 16x2048")
    return batch, length


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["340M"], metavar="SIZE")
    parser.add_argument("--batches", nargs="+", type=pair, default=[(16, 2048), (4, 8192), (1, 32768)], metavar="BxT")
    models = ["gla_ablate", "fla", "llama"]
    parser.add_argument("--models", nargs="+", choices=[*MODELS, RUN], default=models, metavar="MODEL")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--warm", type=int, default=5, help="before those, after the first")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="N")
    parser.add_argument("--profile", action="store_true", help="also where the device's time goes")
    parser.add_argument("--fla-choices", type=Path, metavar="JSON", help="what tune_fla.py stored")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the rows go")
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here: only --device cpu runs without one")
    if RUN in options.models and options.vocabulary != ByteCorpus.vocab_size:
        parser.error(f"--models {RUN} trains on bytes: takes --vocabulary {ByteCorpus.vocab_size}")
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    record: dict[str, Any] = {"stamp": table.stamp(), "rows": []}
    rate = None
    if options.device == "cuda":
        import floors

        rate = floors.measured_ceilings().rate
        record["rate"] = rate
        print(f"{record['stamp']['device']}, multiplies {rate / 1e12:.0f} TFLOP/s in bf16\n")
    if options.fla_choices:
        import fla_choices  # which needs Triton's tuner

        fla_choices.preset(options.fla_choices)
    print(table.header(COLUMNS), flush=True)
    good = True
    for size in options.sizes:
        for batch in options.batches:
            for name in options.models:
                row = Row(size, batch, name)
                try:
                    if name == RUN:
                        fill_from_run(row, options)
                    else:
                        fill(row, options, rate)
                except Exception as error:  # of any kind, a rival's or ours: it is the row's result
                    row.note = f"failed: {rivals.reason(error)}"
                    good = good and not own(name)
                torch.compiler.reset()  # what is compiled for one model is not kept for the next
                if options.device == "cuda":
                    torch.cuda.empty_cache()
                record["rows"].append(asdict(row))
                table.save(options.out, record)
                print(render(row), flush=True)
                if row.profile:
                    print("  ms a step: " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in row.profile.items()))
                if row.data_wait_ms is not None:
                    print(f"  waited for data: {row.data_wait_ms:.3f} ms a step, in the last ten")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
