"""Activation checkpointing and compiled blocks: the same gradients, from less memory."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy

from gla_ablate.config import ModelConfig
from gla_ablate.model import build_model
from gla_ablate.model.gates import Gate, register_gate
from gla_ablate.model.recompute import keep_products, run_block
from gla_ablate.model.shapes import check_model

KINDS = ("none", "elementwise", "block")
SMALL = {"dim": 32, "layers": 2, "heads": 2}


def model_of(**options):
    model = build_model(check_model(ModelConfig(**SMALL | options)), 19)
    with torch.no_grad():
        for vector in (p for p in model.parameters() if p.ndim == 1):  # norm weights that aren't 1
            vector.add_(torch.rand(vector.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    return model


def gradients(model, length=30):
    tokens = torch.randint(19, (2, length), generator=torch.Generator().manual_seed(2))
    loss = model.head(model.hidden(tokens)).logsumexp(-1).sum()
    return torch.autograd.grad(loss, [*model.parameters()])


def compile_blocks(model, recompute, backend="aot_eager"):
    torch._dynamo.reset()  # of what other tests compiled
    run = torch.compile(run_block, fullgraph=True, backend=backend)
    for block in model.blocks:
        block.train_with(run, recompute)


@pytest.mark.parametrize(
    "kind, compiled", [("none", True), ("elementwise", False), ("elementwise", True), ("block", False)]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": {"name": "fixed_decay"}}, {"mixer": ["gla", "softmax"], "short_conv": 4, "rope": True}],
    ids=str,
)
def test_gradients_are_the_same_whatever_is_kept(options, kind, compiled):
    want = gradients(model_of(**options))
    model = model_of(**options)
    if compiled:
        compile_blocks(model, kind)
    else:
        model.tune_training(False, kind)
    torch.testing.assert_close(gradients(model), want)


@pytest.mark.parametrize("name", ["learned_decay", "mamba2", "hgrn2"])
def test_so_they_are_for_gates_that_see_no_input_scale_values_or_make_keys(name):
    options = {"gate": {"name": name}}
    want, model = gradients(model_of(**options)), model_of(**options)
    compile_blocks(model, "elementwise")
    torch.testing.assert_close(gradients(model), want)


def test_norm_weights_on_the_weights_side_give_what_validation_forms():
    model = model_of()
    tokens = torch.randint(19, (2, 30), generator=torch.Generator().manual_seed(2))
    trained = model(tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), trained.detach())


def test_a_gate_that_draws_draws_the_same_again(scratch_registry):
    @register_gate("noisy_test_gate")
    class Noisy(Gate):
        decay_shape = "[B,T,H]"

        def __init__(self, shape):
            super().__init__()
            self.proj = torch.nn.Linear(shape.dim, shape.heads)

        def forward(self, x):
            logits = self.proj(x)
            return torch.nn.functional.logsigmoid(logits + torch.randn_like(logits))

    found = []
    for kind in KINDS:
        model = model_of(gate={"name": "noisy_test_gate"})
        model.tune_training(False, kind)
        torch.manual_seed(3)
        found.append(gradients(model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(
    "options, kinds", [({}, 1), ({"gate": {"name": "hgrn2"}}, 1), ({"mixer": ["gla", "softmax"]}, 2)], ids=str
)
def test_blocks_that_are_alike_are_compiled_once(options, kinds):
    model, counter = model_of(layers=6, **options), CompileCounterWithBackend("aot_eager")
    compile_blocks(model, "elementwise", counter)
    for _ in range(2):
        gradients(model)
    assert counter.frame_count == kinds


def test_a_gate_that_holds_a_name_of_its_layer_s_is_compiled_for_each(monkeypatch, scratch_registry):
    @register_gate("layer_test_gate")
    class OfLayer(Gate):
        decay_shape = "[B,T,H]"

        def __init__(self, shape):
            super().__init__()
            self.proj, self.layer = torch.nn.Linear(shape.dim, shape.heads), str(shape.layer)

        def forward(self, x):
            return torch.nn.functional.logsigmoid(self.proj(x).float()) / (1 + int(self.layer))

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options: real(function, backend=counter))
    torch._dynamo.reset()
    model = model_of(layers=9, gate={"name": "layer_test_gate"})
    model.tune_training(True, "elementwise")
    gradients(model)
    assert counter.frame_count == 9


def test_products_are_kept_and_what_is_done_element_by_element_is_not():
    aten = torch.ops.aten
    wide, narrow = torch.empty(128, 96, device="meta"), torch.empty(16, 96, device="meta")
    x, bias = torch.empty(5, 128, device="meta"), torch.empty(96, device="meta")
    kept = {aten.mm.default: (x, wide), aten.addmm.default: (bias, x, wide), aten.rsqrt.default: (x,)}
    anew = {aten.mm.default: (x[:, :16], narrow), aten.addmm.default: (bias, x[:, :16], narrow)}
    anew |= {aten.mul.Tensor: (x, x), aten.silu.default: (x,), aten._to_copy.default: (x,)}
    assert {keep_products(None, *call) for call in as_calls(kept)} == {CheckpointPolicy.MUST_SAVE}
    assert {keep_products(None, *call) for call in as_calls(anew)} == {CheckpointPolicy.PREFER_RECOMPUTE}


def as_calls(given):
    return [(operator, *arguments) for operator, arguments in given.items()]


def test_the_op_is_kept():
    pytest.importorskip("triton")
    from gla_ablate.ops import library

    assert keep_products(None, library.forward) == CheckpointPolicy.MUST_SAVE
