from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gla_ablate.errors import ConfigError
from gla_ablate.model import GATES, load_plugins, plugin_sha256

GATE = """
from gla_ablate.model import Gate, register_gate

@register_gate("{name}")
class {cls}(Gate):
    decay_shape = "none"
    def __init__(self, shape):
        super().__init__()
    def forward(self, x):
        return None
"""


pytestmark = pytest.mark.usefixtures("scratch_registry")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_plugin_makes_its_gates_usable_by_name(tmp_path):
    load_plugins([write(tmp_path / "mine.py", GATE.format(name="mine", cls="Mine"))])
    assert GATES["mine"].decay_shape == "none"


def test_loading_a_file_again_runs_it_once(tmp_path):
    file = write(tmp_path / "mine.py", GATE.format(name="mine", cls="Mine"))
    load_plugins([file])
    first = GATES["mine"]
    load_plugins([str(file), tmp_path / "." / "mine.py"])
    assert GATES["mine"] is first


def test_files_of_one_name_in_two_folders_are_two_plugins(tmp_path):
    a = write(tmp_path / "a" / "gates.py", GATE.format(name="a", cls="A"))
    b = write(tmp_path / "b" / "gates.py", GATE.format(name="b", cls="B"))
    load_plugins([a, b])
    assert {"a", "b"} <= set(GATES.names())


def test_sha256_is_that_of_the_gates_file_and_none_for_built_in_gates(tmp_path):
    file = write(tmp_path / "mine.py", GATE.format(name="mine", cls="Mine"))
    load_plugins([file])
    assert plugin_sha256("mine") == hashlib.sha256(file.read_bytes()).hexdigest()
    assert plugin_sha256("data_dependent") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("def gate(:", "SyntaxError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        (
            GATE.format(name="none", cls="Mine"),
            "gate 'none' is already registered by gla_ablate.model.gate_family.data_independent.NoGate",
        ),
    ],
    ids=["missing", "syntax", "raises", "exits", "taken name"],
)
def test_plugin_that_does_not_load_is_a_config_error_that_names_the_file(tmp_path, text, told):
    file = tmp_path / "broken.py"
    if text is not None:
        write(file, text)
    with pytest.raises(ConfigError) as error:
        load_plugins([file])
    assert str(file) in str(error.value)
    assert told in str(error.value)
    assert plugin_sha256("none") is None


def test_plugin_that_failed_can_be_mended_and_loaded(tmp_path):
    file = write(tmp_path / "mine.py", GATE.format(name="mine", cls="Mine") + "oops")
    with pytest.raises(ConfigError, match="oops"):
        load_plugins([file])
    write(file, GATE.format(name="mine", cls="Mine"))
    load_plugins([file])
    assert "mine" in GATES
