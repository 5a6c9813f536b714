"""The command as a user types it: exit codes, messages, what is written, and one grid from start to report."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from gla_ablate.cli import main
from gla_ablate.model import GATES

ROOT = Path(__file__).parents[1]
TINY = """
name: t
base: [model/tiny]
set:
  model: {dim: 16, layers: 1, heads: 1, chunk_size: 16}
  data: {name: mqar, vocab_size: 32, pairs: 2, seq_len: 16, batch_size: 2, train_examples: 64, val_tokens: 64}
  trainer: {max_steps: 3, val_every: 3, log_every: 1}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def run_py(*arguments: str | Path, **options) -> subprocess.Popen:
    command = [sys.executable, ROOT / "run.py", *map(str, arguments)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


BAD = {
    "a mistyped key": (TINY + "  optim: {lrr: 1.0}", [], "t.yaml: optim.lrr: no such key, did you mean 'lr'?"),
    "an unknown gate": (TINY + "  model.gate.name: nnone", [], "model.gate.name: unknown gate 'nnone', did you mean"),
    "heads that don't divide": (TINY + "grid: {model.heads: [3]}", [], "model.heads: got 3"),
    "a bad chunk size": (TINY + "grid: {model.chunk_size: [48]}", [], "model.chunk_size: got 48"),
    "an empty grid": (TINY + "grid: {model.heads: []}", [], "grid.model.heads: empty list"),
    "a syntax error": ("name: t\nset: [1\n", [], "t.yaml:3:1: "),
    "a key twice": ("name: t\nname: t\n", [], "t.yaml:2:1: key 'name' stands twice"),
    "a list": ("- name: t\n", [], "takes a mapping"),
    "two trials alike": (TINY + "grid: {model.heads: [1, 1]}", [], "two points are the same trial: model.heads=1 and"),
    "a missing part": ("name: t\nbase: [model/tiney]", [], "no part 'model/tiney', did you mean 'model/tiny'?"),
    "a missing plugin": (TINY + "plugins: [gone.py]", [], "plugins: no such file"),
    "a name that climbs out": ("name: ../t\n", [], "name: got '../t'"),
    "an override without a value": (TINY, ["model.heads"], "takes key=value"),
    "a mistyped override": (TINY, ["modle.heads=1"], "modle: no such key, did you mean 'model'?"),
    "no jobs": (TINY, ["--jobs", "0"], "--jobs: got '0', takes a whole number from 1"),
    "jobs without end": (TINY, ["--jobs", "9999999"], "takes a whole number from 1, below a million"),
    "retries below none": (TINY, ["--max-retries", "-1"], "--max-retries"),
    "retries of no number": (TINY, ["--max-retries", "x"], "--max-retries: got 'x', takes a whole number from 0"),
    "no time": (TINY + "  trainer.max_time: 0", [], "trainer.max_time: got 0.0, takes a number above 0, or null"),
    "an unknown flag": (TINY, ["--dryrun"], "--dryrun"),
    "an unknown launcher": (
        TINY,
        ["--launcher", "slrum"],
        "--launcher: got 'slrum', takes local, ray or slurm, did you",
    ),
    "an option of SLURM's elsewhere": (
        TINY,
        ["--slurm", "time=3"],
        "--slurm: goes with --launcher slurm, not with local",
    ),
    "no such option of SLURM's": (
        TINY,
        ["--slurm", "partitoin=a"],
        "no such key 'partitoin', did you mean 'partition'?",
    ),
    "SLURM's time in hours": (
        TINY,
        ["--slurm", "time=1:00"],
        "time: got '1:00', takes a whole number of minutes from 1",
    ),
    "no value for SLURM": (TINY, ["--slurm", "time"], "--slurm: got 'time', takes key=value"),
    "a part of a GPU of SLURM's": (
        TINY,
        ["--launcher", "slurm", "--per-gpu", "2"],
        "--per-gpu: SLURM gives a job GPUs",
    ),
    "nesting without end": ("name: t\nset: " + "[" * 3000, [], "t.yaml: nested too deeply"),
    "aliases of aliases": (
        "name: t\nset: {"
        + ", ".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else '1'] * 9)}]" for i in range(9))
        + "}",
        [],
        "t.yaml:1:1: its aliases make more than 1,000,000 values of it",
    ),
    "references without end": (
        TINY + f"  optim.lr: '{'${' * 500}x{'}' * 500}'",
        [],
        "t.yaml: optim.lr: references nested",
    ),
    "a whole number beyond floats": (TINY + f"  optim.lr: {'9' * 400}", [], "t.yaml: optim.lr: got 999"),
    "a width beyond any": (
        TINY + "  model.ffn_ratio: 1e308",
        [],
        "model.ffn_ratio: got 1e+308, takes a number above 0, to",
    ),
    "steps beyond any": (TINY + f"  trainer.max_steps: {10**13}", [], "takes a whole number from 1 to 10^12"),
    "a tag that doesn't fit": (TINY + "  optim.lr: !!bool x", [], "t.yaml: 'x'"),
    "more points than anybody has": (
        TINY + f"grid: {{model.layers: {list(range(1, 1100))}, optim.warmup_steps: {list(range(1000))}}}",
        [],
        "t.yaml: grid: makes 1,099,000 points, takes up to 1,000,000",
    ),
    "a dot at the end": (TINY + "grid: {model.heads.: [1]}", [], "t.yaml: model.heads.: no such key"),
    "a key that is a number": (TINY + "exclude: [{model: {1: 2}}]", [], "exclude[0]: {model={1: 2}} matches no point"),
    "a plugin that no file can be": (TINY + 'plugins: ["a\\0b"]', [], "t.yaml: plugins: got 'a\\x00b'"),
    "a plugin of nobody's": (TINY + "plugins: ['~nobody_here/a.py']", [], "plugins: got '~nobody_here/a.py'"),
    "a part that no file can be": (TINY.replace("model/tiny", "a" * 5000), [], "base: no part 'aaa"),
    "a metric that climbs out": (TINY + "report: {metric: gate/../x}", [], "report.metric: no such metric 'gate/../x'"),
    "two things at once": (TINY, ["--dry-run", "--report"], "not allowed with"),
    "a report of nothing": (TINY, ["--report"], "no experiment.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(case, tmp_path, capsys):
    text, arguments, message = BAD[case]
    file = write(tmp_path / "t.yaml", text)
    assert main([str(file), "--out", str(tmp_path / "runs"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "which experiment?"), (["gone.yaml"], "gone.yaml: no such file")]
)
def test_without_an_experiment_there_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    file = write(tmp_path / "t.yaml", TINY)
    assert main([str(file), "--out", str(file)]) == 2
    assert "error: --out: " in capsys.readouterr().err


@pytest.mark.parametrize("link", ["t", "t/report"])
def test_nothing_is_written_where_a_link_leads(link, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / link).parent.mkdir(parents=True)
    (tmp_path / "runs" / link).symlink_to(tmp_path / "elsewhere")
    for given in ([], ["--report"]):
        assert main([str(write(tmp_path / "t.yaml", TINY)), "--out", str(tmp_path / "runs"), *given]) == 2
        assert f"{tmp_path / 'runs' / link}: is a symbolic link" in capsys.readouterr().err
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_that_cannot_be_used_is_one_line(tmp_path, capsys, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("gla_ablate.launch.local.prepare", denied)
    assert main([str(write(tmp_path / "t.yaml", TINY)), "--out", str(tmp_path / "runs")]) == 1
    assert capsys.readouterr().err == "error: somewhere: permission denied\n"


def test_a_sigterm_before_any_trial_runs_ends_it_as_ctrl_c_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gla_ablate.launch.local.prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(write(tmp_path / "t.yaml", TINY)), "--out", str(tmp_path / "runs")]) == 130
    assert capsys.readouterr().err == "interrupted\n" and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("launcher", ["local", "ray", "slurm"])
@pytest.mark.parametrize("threads", ["0", "abc"])
def test_a_number_of_threads_that_is_none_is_told_before_anything_starts(
    threads, launcher, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    file = write(tmp_path / "t.yaml", TINY)
    assert main([str(file), "--out", str(tmp_path / "runs"), "--launcher", launcher]) == 2
    assert capsys.readouterr().err == f"error: OMP_NUM_THREADS: got '{threads}', takes a whole number from 1\n"
    assert not (tmp_path / "runs").exists()


def test_an_output_folder_may_have_any_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gla_ablate.launch.local.run_trials", lambda *_, **__: True)
    out = tmp_path / "ö [red] [/blue]"
    assert main([str(write(tmp_path / "t.yaml", TINY)), "--out", str(out)]) == 130
    assert f"in {out / 't'}" in capsys.readouterr().out


def test_dry_run_prints_every_trial_with_its_cost_and_writes_nothing(tmp_path, capsys):
    file = write(tmp_path / "t.yaml", TINY + "grid: {model.gate.name: [none, fixed_decay]}\nseeds: [0, 1]")
    assert main([str(file), "--dry-run", "seeds=[5]", "--out", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "-seed5" in line]
    assert [row[0].split("-")[0] for row in rows] == ["none", "fixed_decay"]
    for _, parameters, state, memory, unit, tokens, steps in rows:
        assert int(parameters.replace(",", "")) > 1000
        assert (memory, unit) == ("1", "MiB")
        assert (state, tokens, steps) == (
            "128",
            "96",
            "3",
        )  # 1 layer · 1 head · K 8 · V 16; 3 steps · 2 rows · 16 tokens
    assert list(tmp_path.iterdir()) == [file]


def test_dry_run_says_why_a_gate_would_fail(tmp_path, capsys, scratch_registry):
    plugin = write(
        tmp_path / "mine.py",
        "import torch\nfrom gla_ablate.model import Gate, register_gate\n"
        '@register_gate("mine")\nclass Mine(Gate):\n    decay_shape = "[B,T,H]"\n'
        "    def __init__(self, shape):\n        super().__init__()\n"
        "        self.proj = torch.nn.Linear(shape.dim, shape.heads)\n"
        "    def forward(self, x):\n        self.proj(x)\n",
    )
    file = write(tmp_path / "t.yaml", TINY + f"plugins: [{plugin}]\ngrid: {{model.gate.name: [mine, none]}}")
    assert main([str(file), "--dry-run", "--out", str(tmp_path / "runs")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "isn't known, since its step can't be traced: ValueError: gate Mine: gave None, states decay_shape" in out
    assert out.count("isn't known") == 1 and out.count(" MiB ") == 1


def test_dry_run_and_list_gates_need_none_of_the_slow_packages(tmp_path):
    file = write(tmp_path / "t.yaml", TINY + "grid: {model.gate.name: [data_dependent, none, fixed_decay]}")
    code = (
        "import sys; from gla_ablate.cli import main\n"
        f"assert main([{str(file)!r}, '--dry-run']) == main(['--list-gates']) == 0\n"
        "slow = {'lightning', 'datasets', 'pandas', 'matplotlib', 'tensorboard'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_list_gates_prints_each_with_formula_shape_options_and_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--list-gates"]) == 0
    out = capsys.readouterr().out
    for name in GATES.names():
        assert name in out and GATES[name].formula in out and GATES[name].source in out
        for option in GATES.options(name).values():
            assert f"{option.name}: " in out
    assert "rank: int = 16" in out and "[B,T,H,K]" in out


def test_list_gates_shows_the_plugins_of_an_experiment(tmp_path, capsys, scratch_registry):
    write(tmp_path / "gates.py", PLUGIN)
    assert main([str(write(tmp_path / "t.yaml", TINY + "plugins: [gates.py]")), "--list-gates"]) == 0
    assert "e2e_slow" in capsys.readouterr().out


def test_one_run_at_a_time_owns_an_experiments_folder(tmp_path, capsys):
    (tmp_path / "runs" / "t").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / "t" / "run.lock"):
        assert main([str(write(tmp_path / "t.yaml", TINY)), "--out", str(tmp_path / "runs")]) == 2
    assert "another run.py is at work here" in capsys.readouterr().err


def test_a_second_run_says_who_is_at_work(tmp_path):
    long = "trainer.max_steps=100000"
    file = write(tmp_path / "t.yaml", TINY)
    first = run_py(file, long, "--out", tmp_path / "runs", start_new_session=True)
    try:
        held = tmp_path / "runs" / "t" / "run.holder.json"
        deadline = time.monotonic() + 60
        while not held.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = run_py(file, long, "--out", tmp_path / "runs")
        out, err = second.communicate(timeout=60)
        assert second.returncode == 2 and out == ""
        since = json.loads(held.read_text())["since"]
        assert f"at work here (process {first.pid} on {platform.node()} since {since})" in " ".join(err.split())
        assert first.poll() is None
    finally:
        first.kill()  # and its trial with it
        first.wait()


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("of a library") from OSError(28, "No space left on device")

    def full_at(*_):
        raise OSError(28, "No space left on device", "somewhere")

    file = str(write(tmp_path / "t.yaml", TINY))
    monkeypatch.setattr("gla_ablate.launch.local.prepare", full_at)
    assert main([file, "--out", str(tmp_path / "runs")]) == 1
    assert capsys.readouterr().err == (
        "error: somewhere: no space left on the disk; the same command goes on once there is\n"
    )
    monkeypatch.setattr("gla_ablate.launch.local.prepare", full)
    with pytest.raises(RuntimeError, match="of a library"):
        main([file, "--out", str(tmp_path / "runs")])


def test_a_lock_whose_holder_was_killed_is_taken_over(tmp_path):
    first = run_py(write(tmp_path / "t.yaml", TINY), "--out", tmp_path / "runs", start_new_session=True)
    held = tmp_path / "runs" / "t" / "run.holder.json"
    deadline = time.monotonic() + 60
    while not held.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert main([str(tmp_path / "t.yaml"), "--out", str(tmp_path / "runs")]) == 0
    assert not held.exists()  # nobody is at work any more


def test_a_report_follows_the_experiment_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr("gla_ablate.launch.local.run_trials", lambda *_, **__: False)
    monkeypatch.setattr("sys.argv", ["run.py", "t.yaml", "--report"])
    file, out = tmp_path / "t.yaml", ["--out", str(tmp_path / "runs")]
    assert main([str(write(file, TINY)), *out]) == 1
    write(file, TINY + "grid: {model.heads: [1, 2]}\nreport: {metric: val/accuracy, mode: max}\n")
    assert main([str(file), "--report", *out]) == 0
    assert (tmp_path / "runs/t/report/results.csv").read_text().count("val/accuracy") == 2
    assert "python run.py t.yaml\n" in (tmp_path / "runs/t/report/report.md").read_text()
    write(file, TINY + "grid: {model.heads: [1, 2]}\nreport: {best_over: model.heads}\n")
    assert main([str(file), "--report", *out]) == 0
    assert "## Best heads for each variant" in (tmp_path / "runs/t/report/report.md").read_text()


PLUGIN = '''
import time
from pathlib import Path
import torch
from gla_ablate.model import Gate, register_gate

@register_gate("e2e_slow")
class Slow(Gate):
    """Waits in every step while there is a file `wait` beside this one."""
    formula, decay_shape, source = "no decay", "none", "a test"
    def __init__(self, shape):
        super().__init__()
    def forward(self, x):
        while self.training and Path(__file__).with_name("wait").exists():
            time.sleep(0.05)

@register_gate("e2e_broken")
class Broken(Gate):
    formula, decay_shape, source = "NaN", "[H]", "a test"
    def __init__(self, shape):
        super().__init__()
        self.heads = shape.heads
    def forward(self, x):
        return torch.full((self.heads,), float("nan"), device=x.device)
'''


def statuses(folder: Path) -> dict[str, str]:
    return {f.parent.name.split("-")[0]: json.loads(f.read_text())["status"] for f in folder.glob("*/status.json")}


def files(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*")}


def test_a_grid_survives_an_interruption_and_a_failing_trial(tmp_path, capsys, scratch_registry):
    """Ctrl-C in the middle, the same command again, and a third time when only the failed trial is left."""
    write(tmp_path / "gates.py", PLUGIN)
    wait = write(tmp_path / "wait", "")
    grid = "grid: {model.gate: [{name: none}, {name: e2e_slow}, {name: e2e_broken}]}\nplugins: [gates.py]\n"
    command = (write(tmp_path / "t.yaml", TINY + grid), "--out", tmp_path / "runs", "--jobs", "2")
    folder = tmp_path / "runs" / "t"

    first = run_py(*command, start_new_session=True)
    deadline = time.monotonic() + 120
    while (s := statuses(folder)).get("none") != "finished" or s.get("e2e_slow") != "running":
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    time.sleep(1)
    os.killpg(first.pid, signal.SIGINT)  # again, since the trial is in the middle of a step that doesn't end
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in out + err
    assert statuses(folder)["e2e_slow"] == "interrupted"
    (finished,) = folder.glob("none-*")
    untouched = files(finished)

    wait.unlink()
    second = run_py(*command)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 1 and err == ""
    assert statuses(folder) == {"none": "finished", "e2e_slow": "finished", "e2e_broken": "diverged"}
    assert "loss is nan at step 1" in out and "2 of 3 trials finished, 1 diverged" in out
    assert files(finished) == untouched
    assert (folder / "report" / "results.csv").read_text().count("\n") == 4
    (broken,) = folder.glob("e2e_broken-*")
    log = (broken / "log.txt").read_text()
    assert "nan" in log

    arguments = [str(x) for x in command]
    assert main(arguments) == 1
    assert "2 finished already, 1 failed before (--retry-failed runs them again)" in capsys.readouterr().out
    assert (broken / "log.txt").read_text() == log
    assert main([*arguments, "--retry-failed"]) == 1
    assert "2 finished already, 2 at a time" in capsys.readouterr().out
    assert (broken / "log.txt").read_text().count("nan") > log.count("nan")

    assert main([*arguments, "model.gate.name=none"]) == 0
    assert "1 finished already" in capsys.readouterr().out
    assert files(finished) == untouched
