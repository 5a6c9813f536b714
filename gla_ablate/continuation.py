"""`python run.py --generate RUN_FOLDER`: a trained model goes on with a text, on standard output."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import torch

from gla_ablate.data.packing import SEPARATOR
from gla_ablate.errors import ConfigError
from gla_ablate.generate import generate
from gla_ablate.loading import open_folder
from gla_ablate.replay import cast_projections

# What a terminal would obey instead of showing it; a model of bytes can write any of it.
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def go_on(
    folder: Path,
    prompt: bytes,
    tokens: int = 200,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Write what the model in `folder` adds to `prompt`, up to `tokens` bytes or to the end of the document, each
    character as soon as it is whole. An empty prompt begins a document. Raises `ConfigError`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_folder(folder, device)
    if not trained.reads_bytes:
        task = trained.config.data["name"]
        raise ConfigError(f"{folder}: is of the task {task!r}, which has no text; takes a trial on stdlib, text or hub")
    for note in trained.notes:
        print(note, file=sys.stderr)
    # For an empty prompt the separator, after which a document begins. Every byte is a token.
    given = torch.frombuffer(bytearray(prompt or SEPARATOR), dtype=torch.uint8).long()[None]  # [1, T]
    with trained.autocast():
        if torch.is_autocast_enabled(device.type):
            cast_projections(trained.model, torch.get_autocast_dtype(device.type))
        try:
            drawn = generate(trained.model, given, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
            stream((int(token) for token in drawn), sys.stdout)
        except ValueError as error:
            raise ConfigError(f"{folder}: {error}") from error


def stream(tokens: Iterator[int], to: TextIO) -> None:
    """Write bytes as UTF-8, each character as soon as it is whole, up to the separator or the end; then end the line.

    Bytes that are no UTF-8 show as �, and so does on a terminal what would steer it. A reader that has gone ends it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    line_open = False

    def write(text: str) -> None:
        nonlocal line_open
        if text:
            text = text.translate(CONTROLS) if to.isatty() else text
            encoding = to.encoding or "utf-8"
            to.write(text.encode(encoding, "replace").decode(encoding))
            to.flush()
            line_open = not text.endswith("\n")

    try:
        try:
            for token in tokens:
                if token == SEPARATOR[0]:
                    break
                write(decoder.decode(bytes([token])))
            write(decoder.decode(b"", final=True))
        finally:
            if line_open:
                write("\n")
    except BrokenPipeError:
        # What is still in the buffer would be written, and fail again, as Python ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())
