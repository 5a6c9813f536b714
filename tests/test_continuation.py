"""`run.py --generate` as a user types it: what streams when, exit codes, messages."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gla_ablate
from gla_ablate import continuation
from gla_ablate.cli import main
from gla_ablate.continuation import stream
from gla_ablate.generate import generate
from gla_ablate.loading import Trained
from gla_ablate.replay import cast_projections
from tests.test_cli import run_py
from tests.test_trial import MODEL, folder_for, run
from tests.trained import gate_per_head, trained_on_text

PLUGIN = gate_per_head("of_a_continuation")


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    """Of a plugin's gate."""
    base = tmp_path_factory.mktemp("continuation")
    (base / "gate.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_ABLATE_CACHE", str(base / "cache"))
        model = MODEL | {"gate": {"name": "of_a_continuation"}}
        return trained_on_text(base, model=model, plugins=[str(base / "gate.py")])


def said(folder: Path, *arguments: str, **options) -> str:
    with run_py("--generate", folder, *arguments, **options) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out


def expected(folder: Path, prompt: bytes, n: int, **options) -> str:
    """The same in Python: the bytes up to the first 0, as text, with the end of the last line."""
    drawn = generate(gla_ablate.load(folder), torch.tensor([list(prompt)]), n, **options)
    content = bytes(int(token) for token in drawn).partition(b"\0")[0].decode(errors="replace")
    return content + "\n" * (content != "" and not content.endswith("\n"))


def test_a_text_goes_on_as_the_model_says_and_a_seed_repeats_it(trial):
    first = said(trial, "--prompt", "the quick ", "--tokens", "40")
    assert first == expected(trial, b"the quick ", 40)
    assert said(trial, "--prompt", "the quick ", "--tokens", "40", "--seed", "1") == expected(
        trial, b"the quick ", 40, seed=1
    )
    assert first != expected(trial, b"the quick ", 40, seed=1)


def test_options_reach_the_draw_and_an_export_says_the_same(trial, tmp_path, capfdbinary):
    greedy = expected(trial, b"fox", 30, temperature=0)
    assert main(["--export", str(trial), "--to", str(tmp_path / "out")]) == 0
    for given, options in (
        ("--temperature 0", {"temperature": 0}),
        ("--temperature 0.5 --top-k 3 --seed 7", {"temperature": 0.5, "top_k": 3, "seed": 7}),
        ("--top-p 0.2", {"top_p": 0.2}),
    ):
        want = expected(trial, b"fox", 30, **options)
        assert (want == greedy) == ("temperature 0" in given and "." not in given)
        for folder in (trial, tmp_path / "out"):
            capfdbinary.readouterr()
            assert main(["--generate", str(folder), "--prompt", "fox", "--tokens", "30", *given.split()]) == 0
            assert capfdbinary.readouterr() == (want.encode(), b"")


def test_decoding_in_bf16_is_that_of_the_model_under_autocast(trial, monkeypatch, capfdbinary):
    cast = []

    def spy(model, dtype):
        cast.append(dtype)
        cast_projections(model, dtype)

    monkeypatch.setattr(Trained, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(continuation, "cast_projections", spy)
    with torch.autocast("cpu", torch.bfloat16):
        want = expected(trial, b"fox", 30, seed=2)
    assert main(["--generate", str(trial), "--prompt", "fox", "--tokens", "30", "--seed", "2"]) == 0
    assert capfdbinary.readouterr() == (want.encode(), b"")
    assert cast == [torch.bfloat16]


def test_the_default_is_200_tokens(trial, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "gla_ablate.continuation.generate", lambda _, __, n, **options: asked.append((n, options)) or ()
    )
    assert main(["--generate", str(trial)]) == 0
    assert asked == [(200, {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0})]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ([], b"\0"),  # the separator, after which a document begins
        (["--prompt", ""], b"\0"),
        (["--prompt", "ü"], "ü".encode()),
        (["--prompt", os.fsdecode(b"\xff\xfe")], b"\xff\xfe"),  # no text in any encoding
        (["--prompt-file", "p.txt"], b"a\0\r\n\xfcb"),
        (["--prompt-file", "-"], b"of a pipe"),
    ],
)
def test_a_prompt_is_its_bytes(given, prompt, trial, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_bytes(prompt)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    seen = []
    monkeypatch.setattr("gla_ablate.continuation.generate", lambda _, tokens, *__, **___: seen.append(tokens) or ())
    assert main(["--generate", str(trial), *given]) == 0
    assert [tokens.tolist() for tokens in seen] == [[list(prompt)]]


BAD = {
    "a temperature below 0": (["--temperature", "-1"], "--temperature: got '-1', takes a number from 0"),
    "a temperature that is none": (["--temperature", "nan"], "--temperature: got 'nan', takes a number from 0"),
    "a temperature without end": (["--temperature", "inf"], "--temperature: got 'inf', takes a number from 0"),
    "no tokens": (["--tokens", "0"], "--tokens: got '0', takes a whole number from 1"),
    "half a token": (["--tokens", "1.5"], "--tokens: got '1.5', takes a whole number from 1"),
    "none of the likeliest": (["--top-k", "0"], "--top-k: got '0', takes a whole number from 1"),
    "no probability": (["--top-p", "0"], "--top-p: got '0', takes a number above 0, to 1"),
    "more than all": (["--top-p", "1.1"], "--top-p: got '1.1', takes a number above 0, to 1"),
    "a seed that is none": (["--seed", "x"], "--seed: got 'x', takes a whole number from 0"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], "--prompt-file: not allowed with argument --prompt"),
    "a prompt that isn't there": (["--prompt-file", "gone"], "--prompt-file: gone: no such file or directory"),
    "a trial's process": (["--jobs", "2"], "--jobs: doesn't go with --generate"),
    "a retry": (["--max-retries", "2"], "--max-retries: doesn't go with --generate"),
    "a frozen package": (["--frozen"], "--frozen: doesn't go with --generate"),
    "a place": (["--to", "x"], "--to: doesn't go with --generate"),
    "an experiment": (["e.yaml"], "e.yaml: doesn't go with --generate"),
    "two things at once": (["--status"], "not allowed with"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, trial, capsys):
    given, message = BAD[case]
    assert main(["--generate", str(trial), *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "given",
    ["--prompt a", "--prompt=", "--prompt-file a", "--tokens 3", "--temperature 0", "--top-k 3", "--top-p 1",
     "--seed 0", "--to a"],
)  # fmt: skip
@pytest.mark.parametrize("command", [[], ["e.yaml"], ["--list-gates"], ["--export", "a"], ["."]])
def test_what_goes_with_one_command_is_refused_elsewhere(given, command, capsys):
    if given == "--to a" and command == ["--export", "a"]:
        command = ["--generate", "a"]
    assert main([*command, *given.split()]) == 2
    name = re.split("[ =]", given)[0]
    assert re.search(
        f"error: {name}: (goes with --(generate|export) RUN_FOLDER alone|doesn't go)", capsys.readouterr().err
    )


def test_a_task_without_text_is_refused(tmp_path, capsys):
    folder = folder_for(tmp_path / "trial")
    assert run(folder) == 0
    capsys.readouterr()
    assert main(["--generate", str(folder)]) == 2
    assert f"error: {folder}: is of the task 'mqar', which has no text; takes a trial on" in capsys.readouterr().err


def test_weights_that_have_diverged_are_told(trial, tmp_path, capsys):
    folder = shutil.copytree(trial, tmp_path / "trial")
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.norm.weight"][:] = float("inf")
    torch.save(checkpoint, path)
    assert main(["--generate", str(folder), "--prompt", "x"]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: {folder}: the logits of the prompt aren't finite: the weights have diverged\n",
    )


def test_a_plugin_that_has_changed_is_told(trial, tmp_path, capsys):
    folder = shutil.copytree(trial, tmp_path / "trial")
    stamp = folder / "stamp.json"
    stamp.write_text(re.sub('"plugin": "[0-9a-f]+"', '"plugin": "0"', stamp.read_text()))
    assert main(["--generate", str(folder), "--tokens", "1"]) == 0
    assert "not as it was: the file of gate 'of_a_continuation' has changed since" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Keeps what has been shown after each flush."""

    encoding = "utf-8"

    def __init__(self, is_one: bool = False, encoding: str = "utf-8") -> None:
        super().__init__()
        self.shown, self.is_one, self.encoding = [""], is_one, encoding

    def isatty(self) -> bool:
        return self.is_one

    def flush(self) -> None:
        self.shown.append(self.getvalue())


def test_a_character_shows_as_soon_as_it_is_whole_and_not_before():
    terminal, shown = Terminal(), []

    def tokens():
        for byte in "aü€😀b".encode():
            yield byte
            shown.append(terminal.shown[-1])

    stream(tokens(), terminal)
    assert shown == ["a", "a", "aü", "aü", "aü", "aü€", "aü€", "aü€", "aü€", "aü€😀", "aü€😀b"]
    assert terminal.shown[-1] == "aü€😀b\n"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\xffb", "a\ufffdb\n"),  # of no character
        (b"\xe2\x82a", "\ufffda\n"),  # of a character that isn't finished
        (b"a\xf0\x9f", "a\ufffd\n"),  # nor by the end
        (b"a\n", "a\n"),
        (b"", ""),
        (b"ab\0cd", "ab\n"),  # the end of the document
        (b"\0", ""),
        (b"a\x1b[2J\r\tb", "a\x1b[2J\r\tb\n"),
    ],
)
def test_any_bytes_are_text_of_whole_lines(content, text):
    terminal = Terminal()
    stream(iter(content), terminal)
    assert terminal.getvalue() == text


def test_a_terminal_is_not_steered_by_what_a_model_says():
    terminal = Terminal(is_one=True)
    stream(iter(b"a\x1b[2J\r\tb\n\x7f\xc2\x9b\x07"), terminal)
    assert terminal.getvalue() == "a\ufffd[2J\ufffd\tb\n\ufffd\ufffd\ufffd\n"


def test_a_terminal_without_the_character_shows_another():
    terminal = Terminal(encoding="ascii")
    stream(iter("ü!".encode()), terminal)
    assert terminal.getvalue() == "?!\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_line_with_exit_code_130(number, trial):
    """The process's own output is a pipe, which shows that each token is flushed."""
    with run_py("--generate", trial, "--tokens", "999999", "--temperature", "0") as process:
        try:
            first = process.stdout.read(1)
            time.sleep(0.2)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert (first + out).endswith("\n") and err == "interrupted\n"


def test_a_reader_that_has_had_enough_ends_it_quietly(trial):
    with run_py("--generate", trial, "--tokens", "999999", "--temperature", "0") as process:
        try:
            process.stdout.read(1)
            process.stdout.close()
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_a_full_disk_is_told(trial):
    with open("/dev/full", "w") as full:
        command = [sys.executable, Path(__file__).parents[1] / "run.py", "--generate", trial]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1 and process.stderr.startswith("error: no space left on the disk")
