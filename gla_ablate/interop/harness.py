"""Trained trials in lm-evaluation-harness (extra `eval`): its model `gla_ablate`, which this module registers.

    python -m gla_ablate.interop.harness run --model gla_ablate --model_args folder=RUN_FOLDER --tasks lambada_openai

is its command `lm_eval` with that model known to it; in Python import this module, then call `simple_evaluate`.

Text is read as in training, a byte a token; the byte between documents stands before a text that has no context. A
context of any length is read whole, as nothing in a model depends on the length it was trained at, and as it is: a
space at its end, which the harness's models of word pieces count to what follows, is a byte like others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (a registry with a model of ours in it is no longer filled with the harness's own)
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gla_ablate.data.packing import SEPARATOR
from gla_ablate.errors import ConfigError, nearest
from gla_ablate.generate import PIECE, generate
from gla_ablate.loading import Trained, open_folder

Scored = tuple[bytes, int]  # a text, and how many of its first bytes are given: the rest is scored
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one limit, first wins
LONGEST = 256  # bytes that are generated where a task names no limit, as in the harness's own models


@register_model("gla_ablate")
class HarnessModel(LM):
    """A model of text in the harness.

    Args (`--model_args`, with `=` and commas between):
        folder: of a trial, or of an export.
        plugins: the file of the model's gate, if it isn't where config.yaml says.
        seed: of what is drawn, in tasks that sample.
        device: of torch; by default the GPU, if there is one.
        batch_size: rows at a time at most ("auto" is 64), and no more than 65,536 bytes of text, padding included.

    Raises `ConfigError` for a folder without a model of text, and for arguments that there aren't.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        plugins: str | list[str] | None = None,
        seed: int = 0,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        taken = ("folder", "plugins", "seed")
        for key in unknown:
            raise ConfigError(f"--model_args: no such key {key!r}{nearest(key, taken)} (valid: {', '.join(taken)})")
        if folder is None:
            raise ConfigError("--model_args: folder is missing, such as folder=runs/EXPERIMENT/TRIAL")
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"--model_args: seed: got {seed!r}, takes a whole number from 0")
        self.rows = rows_at_a_time(batch_size)
        self.seed = seed
        self._device = device_named(device)
        files = [plugins] if isinstance(plugins, str) else plugins
        self.trained: Trained = open_folder(Path(str(folder)), self._device, files)
        if not self.trained.reads_bytes:
            task = self.trained.config.data["name"]
            raise ConfigError(f"{folder}: is of the task {task!r}, which has no text; takes one on stdlib, text or hub")
        for note in self.trained.notes:
            print(note, file=sys.stderr)

    @property
    def tokenizer_name(self) -> str:
        return "bytes"

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether each of its bytes is the
        most probable one."""
        texts = []
        for context, continuation in (request.args for request in requests):
            given = encoded(context) or SEPARATOR
            texts.append((given + encoded(continuation), len(given)))
        return self.score(texts, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): log p(text) in nats, as a document of its own and in one piece."""
        texts = [(SEPARATOR + encoded(request.args[0]), 1) for request in requests]
        return [total for total, _ in self.score(texts, disable_tqdm)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options): what the model adds up to a stop sequence, the end of the document or the
        limit, the first two left out. Raises `ConfigError` for an option that `generate` doesn't have."""
        asked = [(encoded(request.args[0]) or SEPARATOR, Drawing.of(request.args[1])) for request in requests]
        # A state can't be padded on the left, so that prompts of one length go together.
        order = sorted(range(len(asked)), key=lambda i: (asked[i][1], len(asked[i][0])))
        answers = [""] * len(asked)
        with tqdm(total=len(asked), desc="generate_until", disable=disable_tqdm) as bar:
            for (drawing, length), group in groupby(order, key=lambda i: (asked[i][1], len(asked[i][0]))):
                at_once = max(min(self.rows, PIECE // length), 1)
                same = list(group)
                for first in range(0, len(same), at_once):
                    batch = same[first : first + at_once]
                    prompts = torch.tensor([list(asked[i][0]) for i in batch])
                    for i, text in zip(batch, self.draw(prompts, drawing, self.seed + batch[0]), strict=True):
                        answers[i] = text
                    bar.update(len(batch))
        return answers

    def score(self, texts: list[Scored], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each text's bytes after the given ones, and whether all of them are the most probable.
        Texts of like length go together, padded on the right, which a causal model doesn't see."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        with tqdm(total=len(texts), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in batches([len(text) for text, _ in texts], self.rows):
                for i, result in zip(batch, self.score_batch([texts[i] for i in batch]), strict=True):
                    results[i] = result
                bar.update(len(batch))
        return results

    @torch.no_grad()
    def score_batch(self, texts: list[Scored]) -> list[tuple[float, bool]]:
        rows = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text, _ in texts]
        tokens = pad_sequence(rows, batch_first=True).long().to(self._device)  # [B, T + 1]
        start = torch.tensor([given for _, given in texts], device=self._device)[:, None]
        stop = torch.tensor([len(text) for text, _ in texts], device=self._device)[:, None]
        total = torch.zeros(len(texts), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(texts), dtype=torch.bool, device=self._device)
        position = 1  # of the target
        for logits in self.logits(tokens[:, :-1]):  # [B, t, vocab]
            targets = tokens[:, position : position + logits.shape[1]]  # [B, t]
            index = torch.arange(position, position + logits.shape[1], device=self._device)
            counts = (index >= start) & (index < stop)
            p = F.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
            total += p.double().masked_fill(~counts, 0).sum(1)
            greedy &= ((logits.argmax(-1) == targets) | ~counts).all(1)
            position += logits.shape[1]
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """fp32 logits after `tokens` [B,T], in pieces of T, so that memory stays bounded however long a text is."""
        model, (batch, length) = self.trained.model, tokens.shape
        if not length:  # of empty texts
            return
        piece = max(PIECE // batch, 1)
        cache = model.new_cache(batch, length) if length > piece else None
        for part in tokens.split(piece, 1):
            with self.trained.autocast():
                hidden = model.hidden(part, cache)
            yield F.linear(hidden.float(), model.head.weight)  # in 16 bits a log-probability would have two digits

    def draw(self, prompts: Tensor, drawing: Drawing, seed: int) -> list[str]:
        """What follows each of `prompts` [B,T]."""
        drawn = [bytearray() for _ in prompts]
        ends = (*(encoded(text) for text in drawing.until), SEPARATOR)
        options: dict[str, Any] = {"temperature": drawing.temperature, "top_k": drawing.top_k or None}
        options |= {"top_p": drawing.top_p, "seed": seed}
        with self.trained.autocast():
            try:
                for tokens in generate(self.trained.model, prompts, drawing.length, **options):
                    for text, token in zip(drawn, tokens.tolist(), strict=True):
                        text.append(token)
                    if all(any(end in text for end in ends) for text in drawn):
                        break
            except ValueError as error:
                raise ConfigError(f"generation: {error}") from error
        return [before(text, ends).decode("utf-8", "replace") for text in drawn]


@dataclass(frozen=True, order=True)
class Drawing:
    """How an answer is drawn: a task's generation options."""

    until: tuple[str, ...] = ()
    length: int = LONGEST
    temperature: float = 0.0
    top_k: int = 0  # 0: of all
    top_p: float = 1.0

    @classmethod
    def of(cls, options: dict[str, Any]) -> Drawing:
        """From the harness's names; without `do_sample` the most probable byte is taken. Raises `ConfigError`."""
        left = dict(options)
        until = left.pop("until", None) or []
        lengths = [left.pop(name) for name in LENGTHS if name in left]
        sample = left.pop("do_sample", False)
        # what is null stands for what is left out
        temperature, top_k, top_p = (
            usual if (value := left.pop(name, None)) is None else value
            for name, usual in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0))
        )
        for key in left:
            valid = ("until", *LENGTHS, "do_sample", "temperature", "top_k", "top_p")
            raise ConfigError(
                f"generation_kwargs: no such key {key!r}{nearest(key, valid)} (valid: {', '.join(valid)})"
            )
        stops = (until,) if isinstance(until, str) else tuple(until)
        length = next((int(n) for n in lengths if n is not None), LONGEST)
        drawing = cls(tuple(text for text in stops if text), length)
        if not sample:
            return drawing
        return cls(drawing.until, drawing.length, float(temperature), int(top_k), float(top_p))


def batches(lengths: list[int], rows: int) -> Iterator[list[int]]:
    """Indices of texts that go together, the longest first: `rows` at most, PIECE bytes at most with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[batch[0]] > PIECE):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def encoded(text: str) -> bytes:
    """UTF-8; what isn't a character (half of a surrogate pair) as the bytes that it would have."""
    return text.encode("utf-8", "surrogatepass")


def before(text: bytes | bytearray, ends: Iterable[bytes]) -> bytes:
    """`text` up to the first of `ends` in it."""
    found = [at for end in ends if (at := text.find(end)) >= 0]
    return bytes(text[: min(found, default=len(text))])


def rows_at_a_time(given: int | str | None) -> int:
    """`--batch_size`. Raises `ConfigError`."""
    if given is None or (isinstance(given, str) and given.startswith("auto")):
        return 64
    try:
        rows = int(given)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ConfigError(f"--batch_size: got {given!r}, takes auto or a whole number from 1")
    return rows


def device_named(name: str | None) -> torch.device:
    """`--device`, which the command has as cuda:0 where it isn't given: without a GPU that is the CPU, as of the
    harness's own models. Raises `ConfigError`."""
    try:
        device = torch.device(name or "cuda")
        return device if torch.cuda.is_available() or device.type != "cuda" else torch.device("cpu")
    except RuntimeError as error:
        raise ConfigError(f"--device: got {name!r}, takes cpu, cuda or cuda:N") from error


def main() -> int:
    """The harness's command. A `ConfigError` becomes one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ConfigError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
