"""The look-up of tokens' vectors and its gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gla_ablate.model.embedding import Embedding, embedding_gradient
from tests.ops.cases import DEVICE


def drawn(rows: int, tokens: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table, tokens of which few are many, as in text, and what comes in for their vectors."""
    torch.manual_seed(0)
    found = (torch.rand(2, tokens // 2, device=DEVICE) ** 3 * rows).long()
    given = torch.randn(2, tokens // 2, dim, device=DEVICE, dtype=dtype)
    return torch.randn(rows, dim, device=DEVICE, dtype=dtype), found, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_pytorchs_embedding(dtype: torch.dtype, compiled: bool) -> None:
    weight, tokens, given = drawn(7, 40, 5, dtype)
    ours = Embedding.from_pretrained(weight.clone(), freeze=False)
    plain = nn.Parameter(weight.clone())
    o = (torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours)(tokens)
    want = F.embedding(tokens, plain)
    assert torch.equal(o, want)
    o.backward(given)
    want.backward(given)
    assert ours.weight.grad is not None and plain.grad is not None
    torch.testing.assert_close(ours.weight.grad, plain.grad)


@pytest.mark.parametrize("state", [(False, False), (True, True), (True, False)])
def test_pytorchs_state_is_as_it_was(state: tuple[bool, bool]) -> None:
    _, tokens, given = drawn(7, 40, 5, torch.float32)
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])
    try:
        embedding_gradient(given, tokens, 7)
        found = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == state


def test_the_operator_holds_what_pytorch_asks_of_one() -> None:
    _, tokens, given = drawn(7, 40, 5, torch.float32)
    torch.library.opcheck(embedding_gradient, (given, tokens, 7))


@pytest.mark.parametrize("rows", [256, 32000])
def test_its_gradient_has_the_same_bits_every_time(rows: int) -> None:
    """With PyTorch's own this fails on a GPU at 256 rows."""
    weight, tokens, given = drawn(rows, 16384, 64, torch.float32)
    table = Embedding.from_pretrained(weight, freeze=False)
    found = [torch.autograd.grad(table(tokens), table.weight, given)[0] for _ in range(6)]
    assert all(torch.equal(found[0], x) for x in found)
