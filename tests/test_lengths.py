"""Length extrapolation: what a trial finds at other lengths is what its weights say there, wherever it is told."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gla_ablate.config import merge, read_config, resolve, to_dict
from gla_ablate.data import build_source
from gla_ablate.errors import ConfigError
from gla_ablate.experiment import NOT_IDENTITY, identity, load_experiment, trials
from gla_ablate.lengths import AtLength, LengthEvaluation, positions_csv
from gla_ablate.loading import load
from gla_ablate.module import AblationModule
from gla_ablate.ops.cross_entropy import AT_ONCE
from gla_ablate.resume import Checkpoints, lasting, remove_attempt
from tests.test_trial import MODEL, MQAR, TRAINER, folder_for, metrics, read, run

LENGTHS = [1, 4, 8]  # times 32 tokens: 640 are two spans of 256 and a rest
STEPS = TRAINER["max_steps"]


def text(base: Path, characters: int, val_tokens: int = 640) -> dict:
    (base / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    (base / "val.txt").write_text("".join(chr(97 + i * i // 7 % 26) for i in range(characters)))
    files = {"files": [str(base / "text.txt")], "val_files": [str(base / "val.txt")]}
    return {"name": "text", "seq_len": 32, "batch_size": 4, "val_tokens": val_tokens} | files


@pytest.fixture(scope="module")
def of_text(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_ABLATE_CACHE", str(base / "cache"))
        folder = folder_for(base / "trial", data=text(base, 2000), eval={"lengths": [8, 1, 4]})
        assert run(folder) == 0
        yield folder


@pytest.fixture(scope="module")
def of_recall(tmp_path_factory) -> Path:
    folder = folder_for(tmp_path_factory.mktemp("recall"), data=MQAR, eval={"lengths": [1, 2]}, seed=4)
    assert run(folder) == 0
    return folder


def positions(folder: Path) -> list[dict[str, str]]:
    with (folder / "positions.csv").open() as file:
        return list(csv.DictReader(file))


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {point.step: point.value for point in events.Scalars(tag)}


def naive(folder: Path, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of every target [B,T] by the weights in `folder`; 0 for those that don't count."""
    with torch.no_grad():
        return F.cross_entropy(load(folder)(inputs).mT, targets, reduction="none")


def cut(folder: Path, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B,T], cut from the text in `folder` by hand: the first of seven spans of 256, and the
    fourth."""
    stream = torch.tensor(list((folder.parent / "val.txt").read_bytes() + b"\0"))
    row = 32 * multiple
    begins = [span * 256 + i for span in (0, 3) for i in range(0, 256, row)]
    rows = torch.stack([stream[i : i + row + 1] for i in begins])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@pytest.mark.parametrize("multiple", LENGTHS)
def test_the_loss_at_a_length_is_that_of_the_checkpoint_on_longer_rows_of_the_same_text(of_text, multiple):
    losses = naive(of_text, *cut(of_text, multiple))  # [B, T]
    tag = f"eval/loss_at_{multiple}x"
    assert metrics(of_text)[tag] == {STEPS: pytest.approx(losses.mean().item(), rel=1e-5)}
    assert scalars(of_text, tag) == {STEPS: pytest.approx(losses.mean().item(), rel=1e-5)}
    assert read(of_text, "result.json")["metrics"][tag] == metrics(of_text)[tag][STEPS]
    own = [row for row in positions(of_text) if row["multiple"] == str(multiple)]
    assert len(own) == min(64, 32 * multiple)
    for row in own:
        part = losses[:, int(row["start"]) : int(row["end"])]
        assert int(row["tokens"]) == part.numel() and row["accuracy"] == ""
        assert float(row["loss"]) == pytest.approx(part.mean().item(), rel=1e-5)


def test_losses_by_position_average_to_the_loss_and_are_a_curve_of_the_longest_rows(of_text):
    for multiple in LENGTHS:
        own = [row for row in positions(of_text) if row["multiple"] == str(multiple)]
        mean = sum(float(r["loss"]) * int(r["tokens"]) for r in own) / sum(int(r["tokens"]) for r in own)
        assert mean == pytest.approx(metrics(of_text)[f"eval/loss_at_{multiple}x"][STEPS], rel=1e-6)
    assert own[0]["start"] == "0" and own[-1]["end"] == "256" and {r["tokens"] for r in own} == {"8"}
    assert scalars(of_text, "eval/loss_by_position") == {
        int(row["end"]): pytest.approx(float(row["loss"]), rel=1e-6) for row in own
    }
    assert not any("position" in tag for tag in metrics(of_text))


def test_at_the_length_of_training_a_task_has_the_loss_of_validation(of_recall):
    curves = metrics(of_recall)
    for name in ("loss", "accuracy"):
        assert curves[f"eval/{name}_at_1x"] == {STEPS: curves[f"val/{name}"][STEPS]}, name


def test_a_task_draws_longer_rows_of_as_many_pairs(of_recall):
    source = build_source(read_config(of_recall / "config.yaml").data)
    batch = source.longer_val(2, 2)[list(range(5))]  # 160 tokens are 5 rows of 32
    counts = batch["targets"] != -100
    assert batch["inputs"].shape == (5, 32) and len(source.longer_val(2, 2)) == 5 and (counts.sum(1) == 3).all()
    losses = naive(of_recall, batch["inputs"], batch["targets"])
    with torch.no_grad():
        right = (load(of_recall)(batch["inputs"]).argmax(-1) == batch["targets"])[counts].float().mean().item()
    found = read(of_recall, "result.json")["metrics"]
    assert found["eval/loss_at_2x"] == pytest.approx(losses[counts].mean().item(), rel=1e-5)
    assert found["eval/accuracy_at_2x"] == pytest.approx(right)
    rows = [row for row in positions(of_recall) if row["multiple"] == "2"]
    assert [int(row["tokens"]) for row in rows] == counts.sum(0).tolist()
    assert all((row["loss"] == "") == (row["tokens"] == "0") == (row["accuracy"] == "") for row in rows)


def test_rows_cut_from_whole_validation_text_are_those_of_validation(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_ABLATE_CACHE", str(tmp_path / "cache"))
    source = build_source(resolve({"data": text(tmp_path, 1024, val_tokens=5000)}).data)
    every = list(range(len(source.val)))
    same = source.longer_val(1, 8)
    assert len(same) == len(every) == 32
    assert all(torch.equal(same[every][key], source.val[every][key]) for key in ("inputs", "targets"))
    packed = build_source(resolve({"data": text(tmp_path, 1024, val_tokens=5000) | {"seq_len": 96}}).data).val
    assert [same[31]["inputs"].shape, source.longer_val(3, 3)[7]["targets"].shape] == [(32,), (96,)]
    assert torch.equal(source.longer_val(3, 3)[list(range(10))]["inputs"], packed[list(range(10))]["inputs"])
    assert len(source.longer_val(3, 8)) == 8  # of four spans of 8, two each


class Killed(BaseException):
    pass


@pytest.mark.parametrize("val_every", [3, 7])  # the last validation is one of its own, or one of training
def test_killed_while_it_evaluates_a_trial_does_so_when_it_goes_on(of_recall, tmp_path, monkeypatch, val_every):
    folder = folder_for(tmp_path, eval={"lengths": [1, 2]}, trainer=TRAINER | {"val_every": val_every}, seed=4)
    real = LengthEvaluation.evaluate

    def evaluate(self, trainer, module, multiple):
        if multiple == 2:
            raise Killed
        return real(self, trainer, module, multiple)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LengthEvaluation, "evaluate", evaluate)
        run(folder)
    assert not (folder / "result.json").exists()
    assert run(folder) == 0
    assert evaluated(folder) == evaluated(of_recall)


def test_interrupted_after_the_last_step_a_trial_evaluates_when_it_goes_on(of_recall, tmp_path, monkeypatch):
    folder = folder_for(tmp_path, eval={"lengths": [1, 2]}, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "asked", lambda self: ("SIGTERM" if self.status.step == STEPS else None, False))
        assert run(folder) == 130
    assert read(folder, "status.json")["step"] == STEPS and not (folder / "positions.csv").exists()
    assert run(folder) == 0
    assert evaluated(folder) == evaluated(of_recall)


def evaluated(folder: Path) -> object:
    """All that an evaluation leaves; fails where a metric has a step twice."""
    found = {tag: curve for tag, curve in metrics(folder).items() if tag.startswith("eval/")}
    assert found
    curve = scalars(folder, "eval/loss_by_position")
    return (
        found,
        positions(folder),
        curve,
        {k: v for k, v in read(folder, "result.json")["metrics"].items() if k in found},
    )


def test_what_an_earlier_attempt_left_is_removed(tmp_path):
    (tmp_path / "positions.csv").write_text("stale")
    remove_attempt(tmp_path)
    assert not (tmp_path / "positions.csv").exists()


def test_a_loss_that_is_not_finite_at_some_length_is_told_and_fails_nothing(tmp_path, monkeypatch):
    real = LengthEvaluation.evaluate
    broken = AtLength(2, 32, [1.0], [math.inf], [math.nan], [1.0, math.inf, math.nan])
    monkeypatch.setattr(LengthEvaluation, "evaluate", lambda *a: broken if a[-1] == 2 else real(*a))
    folder = folder_for(tmp_path, eval={"lengths": [1, 2]}, trainer=TRAINER | {"max_steps": 1})
    assert run(folder) == 0
    assert read(folder, "result.json")["metrics"]["eval/loss_at_2x"] == math.inf
    assert positions(folder)[-1]["loss"] == "inf"


def test_logits_are_formed_for_few_tokens_at_a_time(of_text, monkeypatch):
    seen = []
    monkeypatch.setitem(AT_ONCE, "torch", 256 * 50)
    module = AblationModule(read_config(of_text / "config.yaml"))
    module.model.head.register_forward_hook(lambda head, args, out: seen.append(out.numel()))
    inputs, targets = cut(of_text, 8)
    with torch.no_grad():
        parts = [loss for loss, _ in module.scored({"inputs": inputs, "targets": targets})]
        whole = F.cross_entropy(module(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    assert max(seen[:-1]) == 256 * 50 and len(parts) == 11
    torch.testing.assert_close(torch.cat(parts), whole)


def test_buckets_of_a_row_that_they_do_not_divide_cover_it_once():
    at = AtLength(3, 300, [1.0] * 64, [2.0] * 64, None, [64.0, 128.0, 0.0])
    ends = [(start, end) for start, end, *_ in at.by_position()]
    assert ends[0][0] == 0 and ends[-1][1] == 300
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    bucket = torch.arange(300) * 64 // 300
    assert [(int((bucket == i).nonzero().min()), int((bucket == i).nonzero().max()) + 1) for i in range(64)] == ends
    assert positions_csv([at]).splitlines()[1] == "3,0,5,1,2.0,"


RECALL = {"data": MQAR, "model": MODEL}


@pytest.mark.parametrize(
    "given, message",
    [
        ([0], r"eval\.lengths\[0\]: got 0, takes a whole number from 1"),
        ([2, -1], r"eval\.lengths\[1\]: got -1"),
        ([1, 2, 2], r"eval\.lengths\[2\]: 2 stands twice"),
        ([1.5], r"eval\.lengths\[0\]: got 1\.5, takes int"),
        (4, r"eval\.lengths: got 4, takes list\[int\]"),
        ([1, 16], r"eval\.lengths\[1\]: got 16 times data\.seq_len, rows of 256 tokens: data\.val_tokens: got 160, "),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_anything_runs(given, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        resolve(merge(RECALL, {"eval.lengths": given}))


def test_a_text_without_a_row_of_the_longest_length_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_ABLATE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"^eval\.lengths\[1\]: got 21 times .* data\.val_tokens: got 640, takes"):
        resolve({"data": text(tmp_path, 200), "eval": {"lengths": [1, 21]}})
    folder = folder_for(tmp_path / "trial", data=text(tmp_path, 200), eval={"lengths": [1, 8]})
    assert run(folder) == 1
    reason = read(folder, "status.json")["reason"]
    assert reason.startswith("eval.lengths: got 8, but 'text' has 201 bytes of val text, too few for one row of 8")
    assert not (folder / "metrics.csv").exists()


def test_without_lengths_a_trial_is_the_one_that_it_was():
    def of_before(values: dict) -> str:
        """As identities were made when there was no such section."""
        content = {key: value for key, value in values.items() if key not in ("seed", "plugins", "eval")}
        content["trainer"] = {k: v for k, v in content["trainer"].items() if f"trainer.{k}" not in NOT_IDENTITY}
        return hashlib.sha256(json.dumps(content | {"plugin": None}, sort_keys=True).encode()).hexdigest()[:12]

    config = resolve(RECALL)
    assert identity(config) == of_before(to_dict(config))
    assert config.eval.lengths == []
    before = {key: value for key, value in to_dict(config).items() if key != "eval"}
    assert lasting(to_dict(config)) == lasting(before)
    with_some, other_order = (resolve(merge(RECALL, {"eval.lengths": given})) for given in ([1, 2], [2, 1]))
    assert identity(with_some) == identity(other_order) != identity(config)
    assert lasting(to_dict(with_some)) != lasting(before)


def experiment(path: Path, metric: str, more: str = "") -> Path:
    path.write_text(f"""
name: length
set: {{data: {{name: mqar, seq_len: 16, vocab_size: 32}}, eval.lengths: [1, 4]}}
grid: {{data.seq_len: [16, 32]{more}}}
report: {{metric: {metric}}}
""")
    return path


def test_a_report_may_compare_a_length_that_all_trials_have(tmp_path):
    grid = trials(load_experiment(experiment(tmp_path / "a.yaml", "eval/loss_at_4x")))
    assert [trial.config.eval.lengths for trial in grid] == [[1, 4], [1, 4]]
    for metric, more in (("eval/loss_at_8x", ""), ("eval/accuracy_at_4x", ", eval.lengths: [[1, 4], [1]]")):
        loaded = load_experiment(experiment(tmp_path / "b.yaml", metric, more))
        with pytest.raises(ConfigError, match=rf"report\.metric: got {metric}, takes a length that eval\.lengths"):
            trials(loaded)
    for metric in ("eval/loss_at_0x", "eval/loss_at_4", "eval/ppl_at_4x"):
        with pytest.raises(ConfigError, match=r"report\.metric: no such metric"):
            load_experiment(experiment(tmp_path / "c.yaml", metric))
