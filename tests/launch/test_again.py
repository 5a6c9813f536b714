"""`python run.py RUN_FOLDER`: a trial without its experiment."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from gla_ablate import stamp
from gla_ablate.cli import main
from gla_ablate.config import resolve, write_config
from gla_ablate.launch.again import changes, compare

TINY = (
    "name: t\nbase: [model/tiny, data/text, trainer/quick]\n"
    "set: {data.files: [t.yaml], data.seq_len: 16, data.val_tokens: 32, data.batch_size: 2,\n"
    "  trainer.max_steps: 4, trainer.val_every: 2, model.dim: 16, model.layers: 1, model.heads: 1}\n"
)


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    assert main(["t.yaml", "--jobs", "1"]) == 0
    return tmp_path / "runs" / "t"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_trial_runs_again_from_its_folder_and_what_belongs_to_the_grid_no_more_stays(grid, capsys, monkeypatch):
    (home,) = (p.parent for p in grid.glob("*/result.json"))
    before = contents(home)
    capsys.readouterr()
    for name in ("again1", "again2"):
        assert main([str(home)]) == 0
        out = capsys.readouterr().out
        assert f"runs again in {home / name}" in out and "not as it was" not in out
        assert out.count("the same to the last bit") == 3 and "val/loss: " in out
        result = json.loads((home / name / "result.json").read_text())
        assert result["metrics"]["val/loss"] == json.loads(before["result.json"])["metrics"]["val/loss"]
    assert {name: x for name, x in contents(home).items() if "again" not in name} == before

    # one that isn't finished goes on in its own folder
    (home / "result.json").unlink()
    assert main([str(home)]) == 0
    assert "isn't finished, so it goes on" in capsys.readouterr().out
    assert json.loads((home / "result.json").read_text())["metrics"] == json.loads(before["result.json"])["metrics"]

    # the YAML is edited: what is new runs, the old trial is named and stays
    monkeypatch.setattr("gla_ablate.launch.local.run_trials", lambda *_, **__: True)
    Path("t.yaml").write_text(TINY.replace("max_steps: 4", "max_steps: 5"))
    assert main(["t.yaml"]) == 130
    assert f"1 trials there are not of this grid, and stay as they are: {home.name}" in capsys.readouterr().out
    assert (home / "result.json").exists()


@pytest.mark.parametrize(
    "given",
    [
        "a=b",
        "--dry-run",
        "--status",
        "--report",
        "--jobs 4",
        "--per-gpu 2",
        "--out x",
        "--retry-failed",
        "--fail-fast",
        "--list-gates",
        "--launcher ray",
    ],
)
def test_what_makes_no_sense_for_one_trial_is_refused(given, tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert main([str(tmp_path), *given.split()]) == 2
    name = "key=value" if given == "a=b" else given.split()[0]
    assert f"error: {name}: a trial's folder" in capsys.readouterr().err


def test_a_trial_from_its_folder_starts_again_as_often_as_asked_and_not_unless_frozen_code(
    tmp_path, monkeypatch, capsys
):
    given = {}
    monkeypatch.setattr("gla_ablate.launch.again.run_trials", lambda *_, **options: given.update(options) or True)
    write_config(resolve({"data": {"name": "mqar"}}), tmp_path / "config.yaml")
    before = os.getcwd()
    (tmp_path / "stamp.json").write_text(json.dumps({"folder": str(tmp_path)}))
    assert main([str(tmp_path), "--max-retries", "3"]) == 130
    assert given == {"max_retries": 3}
    assert os.getcwd() == before
    monkeypatch.setattr(stamp, "git_state", lambda _: {"sha": "a", "dirty": True})
    assert main([str(tmp_path), "--frozen"]) == 2
    assert "--frozen: there are changes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged",
    [
        {"folder": 3, "git": "a", "versions": [], "machine": 3},
        {"folder": "\0", "git": [], "versions": "a", "machine": {"threads": 0}},
        {"folder": "x" * 10_000, "versions": {"numpy": 3}, "machine": {"threads": True}},
    ],
    ids=str,
)
def test_a_damaged_stamp_is_no_hindrance(damaged, tmp_path, monkeypatch):
    slots = []
    monkeypatch.setattr(
        "gla_ablate.launch.again.run_trials", lambda _, __, given, *___, **____: slots.extend(given) or True
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write_config(resolve({"data": {"name": "mqar"}}), tmp_path / "config.yaml")
    (tmp_path / "stamp.json").write_text(json.dumps(damaged))
    assert main([str(tmp_path)]) == 130
    assert int(slots[0]["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))


def test_of_torch_a_build_is_told_from_another_and_from_itself_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp, "version", lambda name: torch.__version__.split("+")[0])  # as on PyPI
    assert changes({"versions": {"torch": torch.__version__}}) == changes({})
    assert [x for x in changes({"versions": {"torch": "2.0+cu1"}}) if x == f"torch 2.0+cu1, now {torch.__version__}"]


def test_a_folder_that_is_no_trials_or_is_in_use_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no config.yaml here" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("seed: x\n")
    assert main([str(tmp_path)]) == 2
    assert "config.yaml: seed" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("{}\n")
    with FileLock(tmp_path / "trial.lock"):
        assert main([str(tmp_path)]) == 2
    assert "another process is running this trial" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout in the place of the package's."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(stamp, "PACKAGE", tmp_path)
    return tmp_path


def test_what_isnt_committed_is_kept_and_told_apart(checkout, tmp_path):
    home = tmp_path / ".git" / "trial"  # where git doesn't look for files that it doesn't know
    home.mkdir()
    cpu = torch.device("cpu")
    clean = stamp.stamp(home, cpu, "torch", "32-true", {}, None)["git"]
    assert clean["diff"] is None and clean["dirty"] is False and list(home.iterdir()) == []
    (checkout / "code.py").write_bytes(b"x = 2  # \xff\n")
    subprocess.run(["git", "-C", str(checkout), "config", "color.ui", "always"], check=True)
    dirty = stamp.stamp(home, cpu, "torch", "32-true", {}, None)["git"]
    name = dirty["diff"]
    assert dirty["dirty"] is True and b"\n+x = 2  # \xff\n" in (home / name).read_bytes()
    assert changes({"git": dirty}) == []
    assert changes({"git": clean}) == [f"changes that were not committed: none, now {name}"]
    subprocess.run(["git", "-C", str(checkout), "checkout", "code.py"], check=True, capture_output=True)
    subprocess.run(["git", "-C", str(checkout), "apply", str(home / name)], check=True)  # as anybody could
    assert (checkout / "code.py").read_bytes() == b"x = 2  # \xff\n"
    (checkout / "code.py").write_text("x = 1\n")
    (checkout / "new.py").write_text("y = 1\n")  # which git doesn't know
    (home / name).unlink()
    new = stamp.stamp(home, cpu, "torch", "32-true", {}, None)["git"]
    assert new["dirty"] is True and "+++ b/new.py\n@@ -0,0 +1 @@\n+y = 1\n" in (home / new["diff"]).read_text()
    status = subprocess.run(["git", "-C", str(checkout), "status", "--porcelain"], capture_output=True, text=True)
    assert status.stdout == "?? new.py\n"  # nor does it after that
    (checkout / "new.py").unlink()
    assert changes({"git": dirty}) == [f"changes that were not committed: {name}, now none"]
    assert changes({"git": {"sha": "abc", "dirty": False}}) == [f"git abc, now {clean['sha']}"]
    assert changes({"git": clean, "versions": {"numpy": "0.1"}})[0].startswith("numpy 0.1, now ")


def test_frozen_refuses_code_that_isnt_committed(checkout, capsys, tmp_path):
    file = tmp_path / ".git" / "t.yaml"
    file.write_text(TINY.replace("t.yaml", str(file)))
    frozen = [str(file), "--frozen", "--dry-run"]
    assert main(frozen) == 0
    (checkout / "code.py").write_text("x = 2\n")
    assert main(frozen) == 2
    assert "not committed" in capsys.readouterr().err


def test_frozen_refuses_code_that_nobody_could_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stamp, "PACKAGE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(["--list-gates", "--frozen"]) == 2
    assert "in no git checkout" in capsys.readouterr().err


def test_metrics_that_differ_are_told_with_how_much():
    said: list[str] = []
    compare({"metrics": {"val/loss": 2.0, "lr": 1.0}}, {"metrics": {"val/loss": 2.5, "lr": 2.0}}, said.append)
    assert said == ["val/loss: 2 then, 2.5 now, off by 0.5"]


def test_metrics_that_are_none_are_left_out():
    said: list[str] = []
    compare(
        {"metrics": {"val/loss": "2", "val/ppl": None}}, {"metrics": {"val/loss": 2.5, "val/ppl": 1.0}}, said.append
    )
    compare({"metrics": [1]}, {}, said.append)
    assert said == []
