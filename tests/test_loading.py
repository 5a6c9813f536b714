"""A model from a trial's folder or an exported one: the same bits, no code run, and a clear word where it can't be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

import gla_ablate
from gla_ablate.cli import main
from gla_ablate.config import Config, TrainerConfig
from gla_ablate.errors import ConfigError
from gla_ablate.export import export
from gla_ablate.loading import Trained, open_folder, own_weights
from gla_ablate.model import GATES, plugins
from tests.registries import one_of_each_kind
from tests.test_trial import MODEL, MQAR, TRAINER, folder_for, read, run
from tests.trained import trained_on_text

EXAMPLE = Path(__file__).parent / "model" / "example_gate.py"
SHARING = """
import torch
from gla_ablate.model import Gate, GateShape, register_gate

@register_gate("sharing")
class Sharing(Gate):
    decay_shape = "[H]"

    @classmethod
    def build_shared(cls, shape: GateShape):
        return torch.nn.ParameterList([torch.randn(shape.layers, shape.heads)])

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.layer = shape.layer
        self.register_buffer("kept", torch.arange(12.0).view(3, 4)[:, 1])

    def forward(self, x):
        return -torch.nn.functional.softplus(self.shared[0][self.layer])
"""


pytestmark = pytest.mark.usefixtures("scratch_registry")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("loading")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_ABLATE_CACHE", str(base / "cache"))
        return trained_on_text(base)


@pytest.fixture
def trial(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "trial")


@pytest.fixture
def exported(trial) -> Path:
    return export(trial)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """As the trial saved them."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): x for name, x in state.items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def edit(path: Path, **changes) -> None:
    values = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(values))


def test_a_trial_gives_the_weights_of_its_checkpoint_ready_to_use(trial):
    model = gla_ablate.load(trial)
    assert not model.training and not any(module.training for module in model.modules())
    assert equal(dict(model.state_dict()), weights(trial))
    assert model(torch.tensor([list(b"the quick")])).shape == (1, 9, 256)


def test_an_export_gives_the_same_bits_wherever_it_is(trial, exported, tmp_path):
    saved = weights(trial)
    moved = Path(shutil.move(exported, tmp_path / "moved"))
    shutil.rmtree(trial)
    assert sorted(os.listdir(moved)) == ["config.yaml", "export.json", "model.safetensors"]
    assert equal(dict(gla_ablate.load(str(moved)).state_dict()), saved)
    assert equal(safetensors.torch.load_file(moved / "model.safetensors"), saved)


@pytest.mark.parametrize("gate", [*one_of_each_kind(), "sharing", "my_decay"])
@pytest.mark.parametrize("tied", [False, True])
def test_export_and_load_give_the_same_bits_for_every_gate(gate, tied, tmp_path, monkeypatch):
    (tmp_path / "sharing.py").write_text(SHARING)
    shares = gate in ("sharing", "hgrn2")
    model = MODEL | {"gate": {"name": gate}, "tie_embeddings": tied}
    trial = folder_for(tmp_path / "trial", model=model, plugins=[str(EXAMPLE), str(tmp_path / "sharing.py")],
                       trainer=TRAINER | {"max_steps": 2, "val_every": 2})  # fmt: skip
    assert run(trial) == 0
    saved = weights(trial)
    folder = export(trial, tmp_path / "out")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert ("head.weight" in file.keys()) != tied  # noqa: SIM118
        assert sum(".shared." in name for name in file.keys()) == shares  # noqa: SIM118
    for source in (trial, folder):
        model = gla_ablate.load(source)
        assert equal(dict(model.state_dict()), saved)
        assert (model.head.weight is model.embedding.weight) == tied
        assert len(own_weights(model)) == len(saved) - tied - shares


def test_an_export_says_what_it_is(trial, exported):
    stamp, told = read(trial, "stamp.json"), read(exported, "export.json")
    assert told["vocabulary"] == {"tokens": "bytes", "size": 256, "separator": 0}
    assert told["step"] == 4
    assert {key: told[key] for key in ("git", "versions", "precision", "data", "plugin")} == {
        key: stamp[key] for key in ("git", "versions", "precision", "data", "plugin")
    }
    assert not {"machine", "command", "folder"} & told.keys()
    assert (exported / "config.yaml").read_text() == (trial / "config.yaml").read_text()


def test_a_task_without_text_is_exported_with_its_vocabulary(tmp_path):
    trial = folder_for(tmp_path / "trial")
    assert run(trial) == 0
    assert read(export(trial), "export.json")["vocabulary"] == {"tokens": "mqar", "size": MQAR["vocab_size"]}


def test_an_export_again_replaces_what_is_there_and_no_half_is_left(trial, exported, monkeypatch):
    before = (exported / "model.safetensors").read_bytes()

    def full(tensors, path, told):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(trial)
    assert (exported / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(exported)) == ["config.yaml", "export.json", "model.safetensors"]
    monkeypatch.undo()
    (exported / "export.json").write_text('{"sha256": "of other weights"}')
    with pytest.raises(ConfigError, match=r"model.safetensors: it isn't the file that export.json tells of; export it"):
        gla_ablate.load(exported)
    assert export(trial) == exported
    assert equal(dict(gla_ablate.load(exported).state_dict()), weights(trial))


def test_weights_of_a_trial_that_is_not_finished_are_of_use(trial):
    (trial / "result.json").unlink()
    (trial / "stamp.json").write_text("{")
    assert equal(dict(gla_ablate.load(trial).state_dict()), weights(trial))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def cut_short(folder: Path) -> None:
    path = folder / "checkpoints" / "last.ckpt"
    os.truncate(path, path.stat().st_size // 2)


def flipped(folder: Path) -> None:
    path = folder / "checkpoints" / "last.ckpt"
    content = bytearray(path.read_bytes())
    place = content.index(weights(folder)["embedding.weight"].numpy().tobytes()[:64])
    content[place] ^= 1
    path.write_bytes(content)


def changed(**entries):
    def change(folder: Path) -> None:
        path = folder / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        for name, value in entries.items():
            if isinstance(value, dict) and name in checkpoint:
                value = checkpoint[name] | value
            checkpoint[name] = value
        torch.save(checkpoint, path)

    return change


def with_words(count: int):
    wide = torch.ones(count, MODEL["dim"])
    return changed(state_dict={"model.embedding.weight": wide, "model.head.weight": wide})


def with_code(folder: Path) -> None:
    torch.save({"state_dict": Touch(folder / "executed")}, folder / "checkpoints" / "last.ckpt")


def of_another_config(folder: Path) -> None:
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    edit(folder / "config.yaml", model=model | {"layers": 3, "expand_v": 2.0})


DAMAGE = {
    "cut short": (cut_short, "it can't be read (BadZipFile)"),
    "a bit flipped": (flipped, "the checksum of"),
    "code": (with_code, "it can't be read (UnpicklingError)"),
    "no weights": (changed(state_dict=3), "it is no checkpoint of a trial"),
    "no config": (changed(config=[]), "it doesn't say which model it is of"),
    "keys of a later version": (changed(config={"model": {"dreams": 3}}), "another version of this package (dreams:"),
    "another architecture": (of_another_config, "than config.yaml beside it, with model.layers 2, model."),
    "another task": (changed(config={"data": {"name": "mqar"}}), "than config.yaml beside it, with data.name mqar"),
    "another shape": (changed(state_dict={"model.norm.weight": torch.ones(3)}), "says (norm.weight)"),
    "another type": (changed(state_dict={"model.norm.weight": torch.ones(32).half()}), "says (norm.weight)"),
    "one too many": (changed(state_dict={"model.more": torch.ones(3)}), "says (more)"),
    "no embedding": (changed(state_dict={"model.embedding.weight": torch.ones(3)}), "says (embedding.weight)"),
    "more words than there are bytes": (with_words(300), "says (embedding.weight)"),
    "not a tensor": (changed(state_dict={"model.norm.weight": "x"}), "says (norm.weight)"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["--generate", "--export"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_checkpoint_of_no_use_is_one_line_and_exit_code_2(case, command, trial, capsys):
    damage, message = DAMAGE[case]
    damage(trial)
    assert main([command, str(trial)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"error: {trial / 'checkpoints' / 'last.ckpt'}: " in err and message in err
    assert f"; python run.py {trial} runs the trial again, in a folder again1, again2, … inside it" in err
    assert not (trial / "executed").exists() and not (trial / "export").exists()


def test_a_damaged_export_is_told(exported):
    path = exported / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"isn't the file that export.json tells of; export it again"):
        gla_ablate.load(exported)
    (exported / "export.json").unlink()
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"is no export of this package \(SafetensorError\); export it again"):
            gla_ablate.load(exported)
    safetensors.torch.save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match="is no export of this package"):
        gla_ablate.load(exported)
    path.write_bytes(whole)
    gla_ablate.load(exported)
    model = yaml.safe_load((exported / "config.yaml").read_text())["model"]
    edit(exported / "config.yaml", model=model | {"heads": 4})
    with pytest.raises(ConfigError, match=r"of another model than config.yaml beside it, with model.heads 2"):
        gla_ablate.load(exported)


def test_what_changes_speed_alone_may_change_and_a_machine_may_lack_the_backend(trial, monkeypatch):
    model = yaml.safe_load((trial / "config.yaml").read_text())["model"]
    edit(trial / "config.yaml", model=model | {"chunk_size": 64, "backend": "triton"})
    monkeypatch.setattr("gla_ablate.ops.op.interpreted", lambda: False)
    loaded = gla_ablate.load(trial)
    assert {block.mixer.backend for block in loaded.blocks} == {"auto"}
    assert {block.mixer.chunk_size for block in loaded.blocks} == {64}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder; takes the folder of a trial, runs/EXPERIMENT/TRIAL, or an export"),
        (lambda path: path.mkdir(), "no config.yaml here; takes the folder of a trial"),
        (lambda path: folder_for(path / "a"), "or an export, such as {path}/a"),
        (lambda path: folder_for(path), "no weights here, neither checkpoints/last.ckpt nor model.safetensors; python"),
        (lambda path: folder_for(path) and edit(path / "config.yaml", data={"name": "x"}), "data.name: got 'x', takes"),
        (lambda path: folder_for(path) and edit(path / "config.yaml", data={}), "data.name: got None, takes"),
        (
            lambda path: folder_for(path) and edit(path / "config.yaml", data={"name": "mqar"}),
            "data.vocab_size: got None",
        ),
    ],
)
@pytest.mark.parametrize("command", ["--generate", "--export"])
def test_a_folder_without_weights_is_one_line_and_exit_code_2(make, message, command, tmp_path, capsys):
    path = tmp_path / "x"
    make(path)
    assert main([command, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message.format(path=path) in err


def test_a_gate_of_a_plugin_is_found_where_the_trial_had_it_or_where_it_is_said(tmp_path):
    file = tmp_path / "mine.py"
    shutil.copy(EXAMPLE, file)
    model = MODEL | {"gate": {"name": "my_decay"}}
    trial = folder_for(tmp_path / "trial", model=model, plugins=[str(file)], trainer=TRAINER | {"max_steps": 2})
    assert run(trial) == 0
    folder = export(trial)
    shutil.move(file, tmp_path / "moved.py")
    GATES._classes.pop("my_decay")
    plugins._sha256.clear()
    for source in (trial, folder):
        with pytest.raises(ConfigError, match=r"config.yaml: plugins: no such file .*; write there where it is"):
            gla_ablate.load(source)
        with pytest.raises(ConfigError, match="unknown gate 'my_decay'"):
            gla_ablate.load(source, plugins=[])
    assert equal(dict(gla_ablate.load(folder, plugins=[tmp_path / "moved.py"]).state_dict()), weights(trial))
    GATES._classes.pop("my_decay")
    plugins._sha256.clear()
    (tmp_path / "moved.py").write_text(EXAMPLE.read_text() + "\n# changed\n")
    with pytest.warns(UserWarning, match="not as it was: the file of gate 'my_decay' has changed since"):
        gla_ablate.load(trial, plugins=[tmp_path / "moved.py"])
    assert open_folder(trial, plugins=[tmp_path / "moved.py"]).notes


def test_nothing_but_an_export_is_overwritten(trial, tmp_path, capsys):
    config = (trial / "config.yaml").read_bytes()
    assert main(["--export", str(trial), "--to", str(trial)]) == 2
    assert "has a config.yaml that is of no export; name another folder with --to" in capsys.readouterr().err
    assert (trial / "config.yaml").read_bytes() == config
    (tmp_path / "theirs").mkdir()
    theirs = tmp_path / "theirs" / "model.safetensors"
    for content in (b"precious", safetensors.torch.save({"weight": torch.ones(2)}, {"format": "pt"})):
        theirs.write_bytes(content)
        assert main(["--export", str(trial), "--to", str(theirs.parent)]) == 2
        assert "has a model.safetensors that is of no export; name another" in capsys.readouterr().err
        assert theirs.read_bytes() == content
    killed = export(trial, tmp_path / "killed")
    (killed / "export.json").unlink()
    assert export(trial, killed) == killed  # again, after one that didn't come to its record
    file = tmp_path / "file"
    file.touch()
    assert main(["--export", str(trial), "--to", str(file)]) == 2
    assert f"error: --to: {file}: file exists" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    (trial / "export").symlink_to(tmp_path / "elsewhere")
    assert main(["--export", str(trial)]) == 2
    assert "is a symbolic link, and nothing is written where one leads" in capsys.readouterr().err
    assert main(["--export", str(trial), "--to", str(trial / "export")]) == 0
    assert capsys.readouterr().out.startswith(f"{trial / 'export' / 'model.safetensors'}: 0.2 MiB")
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["config.yaml", "export.json", "model.safetensors"]


def test_files_of_an_export_have_the_rights_that_new_files_have(trial):
    before = os.umask(0o027)
    try:
        folder = export(trial)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("recorded", "asked", "kind", "has_bf16", "enabled"),
    [
        ("bf16-mixed", "auto", "cuda", True, True),
        ("bf16-mixed", "auto", "cuda", False, False),
        ("bf16-mixed", "auto", "cpu", True, False),
        ("32-true", "auto", "cuda", True, False),  # trained where there was no bf16
        (None, "auto", "cuda", True, True),  # without a stamp, what the config asks for
        (None, "bf16-mixed", "cuda", True, True),
        (None, "32-true", "cuda", True, False),
    ],
)
def test_a_gpu_decodes_in_bf16_where_the_trial_trained_in_it(recorded, asked, kind, has_bf16, enabled, monkeypatch):
    weight = SimpleNamespace(device=torch.device(kind))
    model: Any = SimpleNamespace(embedding=SimpleNamespace(weight=weight))
    config = Config(trainer=TrainerConfig(precision=asked))
    monkeypatch.setattr(torch, "autocast", lambda *given, enabled: (*given, enabled))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    trained = Trained(model, config, {"precision": recorded} if recorded else {}, 0, [])
    assert trained.autocast() == (kind, torch.bfloat16, enabled)


def test_importing_the_package_imports_no_torch():
    code = "import sys, gla_ablate; assert 'torch' not in sys.modules; gla_ablate.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        gla_ablate.lode  # noqa: B018


def test_loading_needs_no_lightning(trial):
    code = f"import sys, gla_ablate; gla_ablate.load({str(trial)!r}); assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
