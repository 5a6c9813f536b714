"""The loss of a linear head in chunks, against PyTorch's on all logits."""

import pytest
import torch
import torch.nn.functional as F

from gla_ablate.ops import cross_entropy
from gla_ablate.ops.cross_entropy import linear_cross_entropy
from tests.ops.cases import DEVICE, GPU

BACKENDS = ("torch", "triton")


def given(dtype=torch.float32, n=37, width=24, vocab=50):
    seed = torch.Generator().manual_seed(0)
    hidden, weight = (2 * torch.randn(m, width, generator=seed) for m in (n, vocab))
    targets = torch.randint(vocab, (n,), generator=seed)
    return hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype).requires_grad_(), targets.to(DEVICE)


def answers(loss, hidden, weight):
    return [loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "AT_ONCE", dict.fromkeys(BACKENDS, 501))  # of a vocabulary of 50: four chunks


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(small_chunks, backend):
    hidden, weight, targets = given()
    got = answers(linear_cross_entropy(hidden, weight, targets, backend=backend), hidden, weight)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = answers(F.cross_entropy(wide[0] @ wide[1].T, targets), *wide)
    assert [x.dtype for x in got] == [torch.float32] * 3
    assert all(distance(a.double(), b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_several_blocks(monkeypatch, backend):
    monkeypatch.setattr(cross_entropy, "AT_ONCE", dict.fromkeys(BACKENDS, 3 * 9001))
    hidden, weight, targets = given(n=8, width=16, vocab=9001)
    got = answers(linear_cross_entropy(hidden, weight, targets, backend=backend), hidden, weight)
    want = answers(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    assert all(distance(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_fp64_stays_fp64(small_chunks):
    hidden, weight, targets = given(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("backend", ["torch", "triton"] if GPU else ["torch"])  # bf16 is another in the interpreter
def test_autocast_multiplies_in_16_bits_and_sums_in_32(small_chunks, backend):
    hidden, weight, targets = given()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
        whole = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    got, plain = answers(loss, hidden, weight), answers(whole, hidden, weight)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = answers(F.cross_entropy(wide[0] @ wide[1].T, targets), *wide)
    for mine, theirs, right in zip(got, plain, want, strict=True):
        assert mine.dtype == torch.float32
        assert distance(mine.double(), right) < max(1.2 * distance(theirs.double(), right), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_stay_finite_and_a_nan_shows(small_chunks, backend):
    hidden, weight, targets = given()
    with torch.no_grad():
        hidden *= 1e4
    got = answers(linear_cross_entropy(hidden, weight, targets, backend=backend), hidden, weight)
    want = answers(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        hidden[11, 3] = float("nan")
    assert linear_cross_entropy(hidden, weight, targets, backend=backend).isnan()


def test_without_gradients_none_are_formed(small_chunks, monkeypatch):
    hidden, weight, targets = given()
    want = F.cross_entropy(hidden @ weight.T, targets)
    asked = []
    real = cross_entropy.head_loss_shapes
    monkeypatch.setattr(cross_entropy, "head_loss_shapes", lambda *x: (asked.append(x[-1]), real(*x))[1])
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, weight, targets), want)
    assert asked and not any(asked)


def test_few_logits_are_formed_as_before(monkeypatch):
    hidden, weight, targets = given()
    monkeypatch.setattr(cross_entropy, "head_loss", None)
    assert torch.equal(linear_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_passes(small_chunks, backend):
    op, options = torch.ops.gla_ablate.head_loss.default, (torch.float32, backend == "torch")
    torch.library.opcheck(op, (*given(), *options, True))
    torch.library.opcheck(op, (*(x.detach() for x in given()), *options, False))


def test_compiles_without_a_graph_break(small_chunks):
    hidden, weight, targets = given()

    def loss(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, targets)

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for a, b in zip(*(answers(f(hidden, weight), hidden, weight) for f in (compiled, loss)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_a_second_derivative_raises(small_chunks):
    hidden, weight, targets = given()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, targets = given()
    with pytest.raises(ValueError, match=r"hidden, weight: got \[37, 24\], \[50, 23\]"):
        linear_cross_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"targets: got \[36\], takes \[37\]"):
        linear_cross_entropy(hidden, weight, targets[1:])
