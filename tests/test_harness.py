"""Trained trials in lm-evaluation-harness: the sums that the model's logits give, however texts are batched."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import gla_ablate
from gla_ablate.data import packing
from gla_ablate.errors import ConfigError
from gla_ablate.interop import harness
from gla_ablate.interop.harness import HarnessModel
from gla_ablate.model import LanguageModel
from tests.test_trial import MODEL, MQAR, TRAINER, folder_for, run
from tests.trained import trained_on_text

WORDS = ["the", " quick", " brown", " fox", "über", " ", "\n", "日本", "\ud800"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products are small here: threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLA_ABLATE_CACHE", str(base / "cache"))
        hybrid = MODEL | {"mixer": ["gla", "softmax"], "short_conv": 3, "rope": True}
        long = TRAINER | {"max_steps": 60, "val_every": 60}  # until what it writes is ASCII
        return trained_on_text(base, model=hybrid, trainer=long, optim={"lr": 1e-2, "warmup_steps": 5})


def request(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0)


@cache
def loaded(folder: Path) -> LanguageModel:
    return gla_ablate.load(folder).requires_grad_(False)


def naive(folder: Path, given: bytes, scored: bytes) -> tuple[float, bool]:
    """log p(scored | given), and whether each of its bytes is the most probable, of one text by itself in fp64."""
    p = loaded(folder)(torch.tensor([list(given + scored)])).double().log_softmax(-1)[0]
    targets = torch.tensor(list(scored), dtype=torch.long)
    p = p[len(given) - 1 : -1]
    return float(p.gather(-1, targets[:, None]).sum()), bool((p.argmax(-1) == targets).all())


def likeliest(folder: Path, given: bytes, n: int) -> bytes:
    model, tokens = loaded(folder), list(given)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return bytes(tokens[len(given) :])


def texts(n: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [tuple("".join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(2)) for _ in range(n)]


@pytest.mark.parametrize("rows, piece", [(1, 2**16), (5, 2**16), (5, 16)])  # the last through caches, piece by piece
def test_log_likelihoods_are_sums_over_the_models_logits(rows, piece, trial, monkeypatch):
    monkeypatch.setattr(harness, "PIECE", piece)
    model = HarnessModel(str(trial), batch_size=rows)
    pairs = [("", ""), ("", "a"), ("the quick", ""), *texts(9)]
    got = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    whole = model.loglikelihood_rolling([request("loglikelihood_rolling", first) for first, _ in pairs])
    for (context, continuation), (total, greedy), rolling in zip(pairs, got, whole, strict=True):
        first, second = (text.encode("utf-8", "surrogatepass") for text in (context, continuation))
        want, is_greedy = naive(trial, first or packing.SEPARATOR, second)
        assert total == pytest.approx(want, rel=1e-5) and greedy == is_greedy
        assert rolling == pytest.approx(naive(trial, packing.SEPARATOR, first)[0], rel=1e-5)


def test_what_the_model_would_write_is_greedy(trial):
    text = "the quick brown"
    answer = likeliest(trial, text.encode(), 4).decode("ascii")
    model = HarnessModel(str(trial))
    pairs = [(text, answer), (text, answer[:-1] + chr(ord(answer[-1]) ^ 1))]
    got = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    assert [greedy for _, greedy in got] == [True, False]


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_takes_the_likeliest_bytes_up_to_a_stop(rows, trial):
    model = HarnessModel(str(trial), batch_size=rows)
    contexts = ["the quick", "the lazy ", "jumps", "over the", ""]
    whole = [likeliest(trial, text.encode() or packing.SEPARATOR, 12) for text in contexts]
    stop = whole[0][3:4].decode("ascii")
    options = [
        {"max_gen_toks": 12},
        {"max_gen_toks": 12, "until": stop},
        {"max_new_tokens": 12, "until": ["\n\n", stop]},
    ]
    for kwargs in options:
        ends = [packing.SEPARATOR, *(stop.encode() for _ in range("until" in kwargs))]
        want = [harness.before(text, ends).decode("utf-8", "replace") for text in whole]
        got = model.generate_until([request("generate_until", text, kwargs) for text in contexts], disable_tqdm=True)
        assert got == want
    assert stop not in got[0] and len(got[0]) < 4  # the last had something to stop at


def test_sampling_is_seeded_and_repeats_differ(trial):
    asked = [request("generate_until", "the quick", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 20})] * 3
    answers = [HarnessModel(str(trial), seed=seed).generate_until(asked, disable_tqdm=True) for seed in (0, 0, 100)]
    assert answers[0] == answers[1] != answers[2]
    assert len({*answers[0]}) == 3
    small = HarnessModel(str(trial), batch_size=1).generate_until(asked, disable_tqdm=True)
    assert len({*small}) == 3


def task(folder: Path, name: str, **keys) -> str:
    data = {"dataset_path": "json", "test_split": "test"}
    data["dataset_kwargs"] = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **keys}))
    return name


def test_tasks_of_the_harness_give_what_the_logits_give(trial, tmp_path):
    docs = [
        {"text": "the quick brown", "right": " fox", "wrong": " lazy dog"},
        {"text": "five dozen", "right": " jugs", "wrong": " jumps"},
        {"text": "the lazy", "right": " dog", "wrong": " fox"},
    ]
    docs[2]["right"] = likeliest(trial, docs[2]["text"].encode(), 3).decode("ascii")
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    names = [
        task(tmp_path, "choice", output_type="multiple_choice", doc_to_text="{{text}}", target_delimiter="",
             doc_to_choice="{{[wrong, right]}}", doc_to_target=1, metric_list=[{"metric": "acc"}]),
        task(tmp_path, "rolling", output_type="loglikelihood_rolling", doc_to_text="",
             doc_to_target="{{text}}{{right}}", metric_list=[{"metric": "bits_per_byte"}]),
        task(tmp_path, "write", output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{right}}",
             generation_kwargs={"until": ["\n\n"], "max_gen_toks": 3}, metric_list=[{"metric": "exact_match"}]),
    ]  # fmt: skip
    results = simple_evaluate(
        model="gla_ablate", model_args=f"folder={trial}", tasks=names, batch_size=2, device="cpu", bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )["results"]  # fmt: skip
    scores = [[naive(trial, doc["text"].encode(), doc[key].encode())[0] for key in ("wrong", "right")] for doc in docs]
    assert results["choice"]["acc,none"] == pytest.approx(sum(right > wrong for wrong, right in scores) / 3)
    whole = [(doc["text"] + doc["right"]).encode() for doc in docs]
    bits = -sum(naive(trial, packing.SEPARATOR, text)[0] for text in whole) / sum(map(len, whole)) / math.log(2)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    written = [likeliest(trial, doc["text"].encode(), 3).decode("utf-8", "replace") == doc["right"] for doc in docs]
    assert results["write"]["exact_match,none"] == pytest.approx(sum(written) / 3) and written[2]


def test_the_models_of_the_harness_are_still_there():
    assert get_model("gla_ablate") is HarnessModel
    assert get_model("dummy").__name__ == "DummyLM"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "--model_args: folder is missing, such as folder=runs/EXPERIMENT/TRIAL"),
        ({"folder": "nowhere"}, "nowhere: no such folder"),
        ({"folder": "x", "foldr": 1}, "--model_args: no such key 'foldr', did you mean 'folder'"),
        ({"folder": "x", "seed": -1}, "--model_args: seed: got -1, takes a whole number from 0"),
        ({"folder": "x", "batch_size": 0}, "--batch_size: got 0, takes auto or a whole number from 1"),
        ({"folder": "x", "batch_size": "many"}, "--batch_size: got 'many', takes auto"),
        ({"folder": "x", "device": "gpu"}, "--device: got 'gpu', takes cpu, cuda or cuda:N"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        HarnessModel(**arguments)
    assert message in str(error.value)


def test_an_option_of_null_is_as_if_it_were_left_out(trial):
    asked = {"do_sample": True, "max_gen_toks": 8}
    nulls = asked | {"temperature": None, "top_k": None, "top_p": None, "until": None}
    model = HarnessModel(str(trial))
    answers = [
        model.generate_until([request("generate_until", "the quick", kwargs)], disable_tqdm=True)
        for kwargs in (asked, nulls)
    ]
    assert answers[0] == answers[1]


def test_a_generation_option_that_there_is_not_is_refused(trial):
    model = HarnessModel(str(trial), batch_size="auto")
    for kwargs, message in [
        ({"num_beams": 4}, "generation_kwargs: no such key 'num_beams'"),
        ({"do_sample": True, "temperature": -1}, "temperature: got -1.0, takes a number from 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model.generate_until([request("generate_until", "the", kwargs)], disable_tqdm=True)


def test_a_trial_without_text_is_refused(tmp_path):
    trial = folder_for(tmp_path / "trial", data=MQAR, trainer=TRAINER | {"max_steps": 1, "val_every": 1})
    assert run(trial) == 0
    with pytest.raises(ConfigError, match="is of the task 'mqar', which has no text; takes one on stdlib, text or hub"):
        HarnessModel(str(trial))


def test_the_command_says_a_mistake_in_one_line(monkeypatch, capsys):
    def refuse() -> None:
        raise ConfigError("nowhere: no such\nfolder")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    assert harness.main() == 2
    assert capsys.readouterr().err == "error: nowhere: no such folder\n"
