"""How flash-linear-attention is let to tune itself, with a tuner of Triton's but without a GPU or FLA."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner, Config
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fla_choices
import tune_fla
from shapes import Shape

SMALL = Shape("small", 1, 16, 1, 16, 16)
KEY = (64, "torch.bfloat16")


class Tuner(Autotuner):
    """Times nothing: a candidate takes as many ms as its BK, or doesn't run."""

    def __init__(self, sizes, broken=()):
        self.configs = [Config({"BK": size}, num_warps=4) for size in sizes]
        self.broken, self.cache, self.tried = broken, {}, []
        self.arg_names, self.keys, self.base_fn = ["n", "x"], ["n"], SimpleNamespace(__name__="some_kernel")


def run(tuner, *_):
    def tried(config):
        tuner.tried.append(config.kwargs["BK"])
        if config.kwargs["BK"] in tuner.broken:
            raise OutOfResources(1, 0, "shared memory")
        return tuner.do_bench(lambda: config.kwargs["BK"], quantiles=None)[0]

    if KEY not in tuner.cache:
        tuner.cache[KEY] = min(tuner.configs, key=tried)


@pytest.fixture
def op(monkeypatch):
    """Makes FLA's op one that runs a tuner, and nothing else."""

    def use(tuner):
        monkeypatch.setattr(Autotuner, "run", run)
        monkeypatch.setattr(
            tune_fla.rivals, "load", lambda *_: lambda q, *_rest: (tuner.run(64, q.bfloat16()), q * 1.0)[1]
        )
        monkeypatch.setattr(tune_fla, "inputs", lambda shape, kind, strength, _: _inputs(shape, kind, strength, "cpu"))
        monkeypatch.setattr(tune_fla.torch.cuda, "synchronize", lambda: None)
        return tuner

    _inputs = tune_fla.inputs
    return use


def bench(call, quantiles=None):
    return [float(call()), 0.0, 0.0]


def test_a_share_tries_its_own_candidates_alone(op):
    tuner = op(Tuner([16, 32, 64, 128]))
    tune_fla.tune(SMALL, "none", bench, (1, 2))
    assert tuner.tried == [32, 128] and len(tuner.configs) == 4


def test_a_share_that_does_not_run_here_gives_way_to_the_next(op):
    tuner = op(Tuner([16, 32, 64], broken=(32,)))
    tune_fla.tune(SMALL, "none", bench, (1, 3))
    assert tuner.tried == [32, 64] and tuner.cache[KEY].kwargs == {"BK": 64}


def test_where_nothing_runs_it_says_so(op):
    with pytest.raises(RuntimeError, match="none of FLA's candidates for some_kernel runs"):
        tune_fla.tune(SMALL, "none", bench, (0, 1)) if op(Tuner([16], broken=(16,))) else None


def test_what_was_chosen_is_stored_beside_what_was_stored_before_and_chosen_again(op, tmp_path, monkeypatch):
    monkeypatch.setattr(fla_choices, "_known", {})
    file = tmp_path / "choices.json"
    old = {"device": "a GPU", "triton": triton.__version__, "choices": {"other_kernel": [[[16], {"num_warps": 1}]]}}
    file.write_text(json.dumps(old))
    tuner = op(Tuner([64, 16]))
    tune_fla.tune(SMALL, "none", bench)
    fla_choices.store(file, "a GPU")
    stored = json.loads(file.read_text())["choices"]
    assert stored["other_kernel"] == old["choices"]["other_kernel"]
    (entry,) = stored["some_kernel"]
    assert entry[0] == list(KEY) and entry[1]["kwargs"] == {"BK": 16}

    del tuner
    fla_choices.preset(file)
    again = op(Tuner([64, 32, 16]))
    tune_fla.tune(SMALL, "none", bench, (1, 3))
    assert again.tried == [] and again.cache[KEY].kwargs == {"BK": 16} and again.cache[KEY].num_warps == 4


def test_the_key_is_what_triton_tunes_for(monkeypatch):
    """Compared with the key under which Triton's own tuner keeps its choice."""
    kernel = SimpleNamespace(__name__="kernel", run=lambda *args, **kwargs: None)
    tuner = Autotuner.__new__(Autotuner)
    tuner.arg_names, tuner.keys, tuner.cache = ["x", "y", "n", "WIDE"], ["n", "WIDE"], {}
    tuner.configs, tuner.base_fn, tuner.fn = [Config({"BK": 1}), Config({"BK": 2})], kernel, kernel
    tuner.perf_model, tuner.early_config_prune, tuner.cache_results = None, None, False
    tuner.pre_hook = tuner.post_hook = lambda *args, **kwargs: None
    tuner.do_bench = lambda call, quantiles: [1.0, 1.0, 1.0]
    args, kwargs = (torch.ones(2), torch.ones(2).bfloat16()), {"n": 3, "WIDE": True, "grid": (1,)}
    fla_choices._run(tuner, *args, **kwargs)
    assert list(tuner.cache) == [fla_choices.key_of(tuner, args, kwargs)]


def test_choices_of_another_triton_are_refused(tmp_path):
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"device": "a GPU", "triton": "0.1", "choices": {}}))
    with pytest.raises(ValueError, match="chosen with Triton 0"):
        fla_choices.preset(file)
