"""What a GPU holds and sends in a training step under ddp and fsdp, from 1 to 64 GPUs: computed, nothing is measured.

    python benchmarks/scaling.py        # the tables of docs/scaling.md

With P parameters, P_b of them in each of L blocks and P_r in embedding, norm and head, on W GPUs, in bf16-mixed:

memory       ddp    16 P             weights, gradients and AdamW's two moments in fp32
                    + 2 P            the weights in bf16, as autocast keeps them for the backward pass
             fsdp   16 P / W
                    + 4 P_r          embedding, norm and head in bf16, gathered, and their gradients
                    + 10 P_b         two blocks in bf16, gathered; the gradients of one in bf16 and, to be summed, fp32
             both   + activations    of a GPU's own rows: what an eager step allocates at its peak, traced without a GPU
sent         ddp    2 (W−1)/W · 4 P                          a ring all-reduce of fp32 gradients
             fsdp   (W−1)/W · (2 · 2 L P_b + 2 P_r + 4 P)    bf16 weights gathered for forward and backward, fp32
                                                             gradients scattered
             of each GPU in a step; it receives as much
time         compute        `flops_per_token` · tokens of a GPU / RATE
             communication  sent / bandwidth: NVLINK within a node; NETWORK beyond, since a ring is as slow as its
                            slowest link. Both overlap: a step lies between the larger and the sum.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # so that the kernels' memory can be traced

import table

from gla_ablate.config import Config, ModelConfig
from gla_ablate.memory import OPTIMISER, WEIGHT, training_bytes
from gla_ablate.model import count_parameters, flops_per_token
from gla_ablate.model.shapes import check_model

VOCABULARY, SEQ_LEN = 32_000, 2048
GPUS = (1, 2, 8, 16, 64)
NODE = 8  # GPUs of a node
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of a GPU in each direction: NVLink 4; 400 Gb/s
RATE = 400e12  # FLOP/s: 40 % of what an H100 has in bf16
GRADIENT = 4  # bytes a parameter
COLUMNS = ("GPUs", "strategy", "GB a GPU", "of weights", "of activations", "GB sent", "sending ms", "computing ms")


@dataclass(frozen=True)
class Size:
    """A model, and the rows of `SEQ_LEN` tokens that a GPU has of each batch."""

    name: str
    model: ModelConfig
    rows: int

    @cached_property
    def parameters(self) -> int:
        return count_parameters(self.model, VOCABULARY)

    @cached_property
    def root(self) -> int:
        """Parameters of embedding, norm and head."""
        return 2 * VOCABULARY * self.model.dim + self.model.dim

    @property
    def block(self) -> int:
        return (self.parameters - self.root) // self.model.layers

    @cached_property
    def activations(self) -> int:
        """Bytes at the peak of a step, beyond weights, gradients, moments and bf16 weights."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        data = {"batch_size": self.rows, "seq_len": SEQ_LEN}
        traced = training_bytes(Config(replace(self.model, backend="triton"), data), VOCABULARY, device, bf16=True)
        if traced is None:
            raise ValueError(f"{self.name}: its training step can't be traced")
        return traced - (WEIGHT + OPTIMISER + GRADIENT + 2) * self.parameters

    def weights(self, strategy: str, gpus: int) -> float:
        """Bytes of weights, gradients and moments on each GPU."""
        whole = (WEIGHT + OPTIMISER + GRADIENT) * self.parameters
        if strategy == "ddp":
            return whole + 2 * self.parameters
        return whole / gpus + 4 * self.root + 10 * self.block

    def sent(self, strategy: str, gpus: int) -> float:
        """Bytes that each GPU sends in a step."""
        others = (gpus - 1) / gpus
        if strategy == "ddp":
            return 2 * others * GRADIENT * self.parameters
        gathered = 2 * 2 * self.block * self.model.layers + 2 * self.root
        return others * (gathered + GRADIENT * self.parameters)

    def computing(self) -> float:
        """Seconds of a step."""
        return flops_per_token(self.model, VOCABULARY, SEQ_LEN) * self.rows * SEQ_LEN / RATE


def size(name: str, rows: int, dim: int, layers: int, heads: int) -> Size:
    return Size(name, check_model(ModelConfig(dim=dim, layers=layers, heads=heads, ffn_multiple=256)), rows)


SIZES = (
    size("1.3B", 4, dim=2048, layers=24, heads=4),  # configs/model/1.3B.yaml
    size("7B", 1, dim=4096, layers=32, heads=8),  # the op takes 512 channels a head at most
)


def sending(sent: float, gpus: int) -> float:
    """Seconds."""
    return sent / (NVLINK if gpus <= NODE else NETWORK)


def row(of: Size, strategy: str, gpus: int) -> list[str]:
    weights, sent = of.weights(strategy, gpus), of.sent(strategy, gpus)
    cells = (weights + of.activations, weights, float(of.activations), sent)
    times = (sending(sent, gpus), of.computing())
    return [str(gpus), strategy, *(f"{x / 1e9:.1f}" for x in cells), *(f"{1e3 * x:.0f}" for x in times)]


def main() -> None:
    for of in SIZES:
        print(f"\n{of.name}: {of.parameters:,} parameters, {of.rows} × {SEQ_LEN} tokens a GPU\n")
        print(table.header(COLUMNS))
        for gpus in GPUS:
            # one GPU divides nothing, whatever it is asked
            for strategy in ("ddp", "fsdp") if gpus > 1 else ("ddp",):
                cells = row(of, strategy, gpus)
                print(table.line(cells if gpus > 1 else [cells[0], "–", *cells[2:]]))


if __name__ == "__main__":
    main()
