"""How flash-linear-attention is let to tune itself, with a tuner of Triton's but without a GPU or FLA."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import triton
from triton.runtime.autotuner import Autotuner, Config
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tune_fla
from shapes import Shape

SMALL = Shape("small", 1, 16, 1, 16, 16)
KEY = (64, "torch.bfloat16")


class Tuner(Autotuner):
    """Times nothing: a candidate takes as many ms as its BK, or doesn't run."""

    def __init__(self, sizes, broken=()):
        self.configs = [Config({"BK": size}, num_warps=4) for size in sizes]
        self.broken, self.cache, self.tried = broken, {}, []
        self.kernel_name, self.base_fn = "some_kernel", SimpleNamespace(__name__="some_kernel")


def run(tuner):
    def tried(config):
        tuner.tried.append(config.kwargs["BK"])
        if config.kwargs["BK"] in tuner.broken:
            raise OutOfResources(1, 0, "shared memory")
        return tuner.do_bench(lambda: config.kwargs["BK"], quantiles=None)[0]

    tuner.cache[KEY] = min(tuner.configs, key=tried)


@pytest.fixture
def op(monkeypatch):
    """Makes FLA's op one that runs a tuner, and nothing else."""

    def use(tuner):
        monkeypatch.setattr(Autotuner, "run", run)
        monkeypatch.setattr(tune_fla.rivals, "load", lambda *_: lambda q, *_rest: (tuner.run(), q * 1.0)[1])
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


def test_what_was_chosen_is_stored_beside_what_was_stored_before(op, tmp_path, monkeypatch):
    cache = ModuleType("fla.ops.utils.cache")
    cache.AutotuneKey = SimpleNamespace(key_hash=lambda key: "-".join(map(str, key)))
    for name in ("fla", "fla.ops", "fla.ops.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.utils.cache", cache)
    file = tmp_path / "choices" / "some_kernel.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"autotune_entries": {"old": {}}}))
    tuner = op(Tuner([64, 16]))
    tune_fla.tune(SMALL, "none", bench)
    tune_fla.store(file.parent)
    stored = json.loads(file.read_text())
    assert stored["triton_version"] == triton.__version__ and set(stored["autotune_entries"]) == {
        "old",
        "64-torch.bfloat16",
    }
    assert stored["autotune_entries"]["64-torch.bfloat16"]["config"]["kwargs"] == {"BK": 16}
    assert tuner.cache[KEY].num_warps == 4
