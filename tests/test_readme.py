"""The README's commands and examples work as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import gla_ablate
from gla_ablate import memory
from gla_ablate.cli import main
from gla_ablate.data.source import DATA
from gla_ablate.model import GATES
from tests.trained import trained_on_text

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Arguments of every `python run.py …` in the README's shell blocks."""
    lines = "\n".join(blocks("sh")).replace(" && ", "\n").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python run.py")]


def of_weights() -> list[list[str]]:
    """Those that need a trial that has run."""
    return [arguments for arguments in commands() if arguments[0] in ("--generate", "--export")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's own files, and the shipped experiments, as the working directory."""
    (grid,) = blocks("yaml")
    (tmp_path / "my_grid.yaml").write_text(grid, encoding="utf-8")
    gate = next(block for block in blocks("python") if "register_gate" in block)
    (tmp_path / "my_gates.py").write_text(gate, encoding="utf-8")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_commands() -> None:
    assert ["experiments/quickstart.yaml"] in commands()
    assert len(commands()) >= 6
    assert {arguments[0] for arguments in of_weights()} == {"--generate", "--export"}


@pytest.mark.parametrize("arguments", [a for a in commands() if a not in of_weights()], ids=" ".join)
def test_every_command_of_the_readme_is_valid(
    arguments: list[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = ("--report", "--status", "--frozen")  # which need trials that have run, and all of it committed
    without = [argument for argument in arguments if argument not in elsewhere]
    if not {"--list-gates", "--dry-run"} & set(without):
        without.append("--dry-run")
        monkeypatch.setattr(memory, "training_bytes", lambda *_: 0)  # seconds each time, and once is enough
    assert main(without) == 0


def test_the_readme_s_gate_trains_as_a_plugin(project: Path) -> None:
    (project / "mine.yaml").write_text(
        "name: mine\nbase: [model/tiny, data/text, trainer/quick]\nplugins: [my_gates.py]\n"
        "set: {data.files: [my_gates.py, my_grid.yaml], data.seq_len: 16, data.val_tokens: 64, data.batch_size: 2,\n"
        "  trainer.max_steps: 3, model.dim: 32}\n"
        "grid: {model.gate: [{name: per_head, tau: 8.0}, {name: none}]}\n",
        encoding="utf-8",
    )
    assert main(["mine.yaml"]) == 0
    report = (project / "runs" / "mine" / "report" / "report.md").read_text(encoding="utf-8")
    assert "per_head" in report


def test_every_command_on_a_trial_s_weights_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLA_ABLATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    trial = trained_on_text(tmp_path)
    (tmp_path / "start.py").write_text("def main(")
    for arguments in of_weights():
        assert main([str(trial) if "TRIAL" in word else word for word in arguments]) == 0
    (loads,) = [block for block in blocks("python") if "gla_ablate.load(" in block]
    names: dict = {}
    exec(loads.replace("cuda", "cpu"), names)
    assert names["model"](torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 256)
    (reads,) = [block for block in blocks("python") if "from_fla(" in block]
    exec(reads, names)
    assert Path("fla_again/config.json").is_file() and Path("fla_again/model.safetensors").is_file()
    assert torch.equal(names["model"].embedding.weight, gla_ablate.load(trial).embedding.weight)


def test_every_link_to_a_file_of_the_project_leads_there() -> None:
    targets = {target for target in re.findall(r"\]\(([^)\s]+)\)", README) if not target.startswith("https://")}
    assert {"docs/gla.md", "results/README.md", "benchmarks/README.md"} <= targets
    assert [target for target in sorted(targets) if not (ROOT / target).exists()] == []


def test_gates_tasks_and_experiments_are_named_and_all_files_of_the_layout_are_there() -> None:
    registries = (GATES, DATA)
    names = [n for known in registries for n in known.names() if known[n].__module__.startswith("gla_ablate.")]
    names += [file.stem for file in (ROOT / "experiments").glob("*.yaml") if file.stem != "quickstart"]
    assert [name for name in names if f"`{name}`" not in README] == []
    layout = README.split("## Layout")[1]
    for row in re.findall(r"^\| (`.+?) \|", layout, re.MULTILINE):
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name:
                folder = (ROOT / name).parent
            assert (ROOT / name).exists() or (folder / name).exists(), name
