"""What only a GPU shows: CUDA graphs, the same bits every time, sizes past 32 bits, a million tokens, running out."""

import pytest
import torch
from torch import Tensor

from gla_ablate.ops import gated_linear_attention
from gla_ablate.ops.kernels.call import Call
from gla_ablate.ops.op import auto_chunk
from tests.ops.cases import GPU, KINDS

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")
LARGE = pytest.mark.xdist_group("takes most of a GPU's memory, so one after the other")


def inputs(kind: str, B: int, T: int, H: int, K: int, V: int) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, n, device="cuda", dtype=torch.bfloat16) for n in (K, K, V))
    shape = {"none": (), "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[kind]
    gates = [] if kind == "none" else [torch.rand(shape, device="cuda").mul_(-0.1)]
    return [x.requires_grad_() for x in (q, k, v, *gates)]


def looks_back(given: list[Tensor]) -> bool:
    """Whether the op cuts them into segments that do."""
    q, k, v, *gate = given
    return Call(q, k, v, gate[0] if gate else None, None, 1.0, auto_chunk("triton", k.shape[3])).looks_back


def outcome(given: list[Tensor]) -> list[Tensor]:
    o, _ = gated_linear_attention(*given)
    return [o, *torch.autograd.grad(o, given, torch.ones_like(o))]


@pytest.mark.parametrize("sizes", [(2, 1000, 4, 128, 256), (1, 8000, 8, 64, 64)], ids=["whole", "segments"])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_runs_give_the_same_bits(kind: str, sizes: tuple[int, ...]) -> None:
    given = inputs(kind, *sizes)
    assert looks_back(given) == (sizes[-1] == 64 and kind != "channel")
    first = outcome(given)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, outcome(given), strict=True))


@pytest.mark.parametrize("sizes", [(2, 300, 4, 256, 128), (1, 8000, 8, 64, 64)], ids=["whole", "segments"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_replays_on_new_inputs(kind: str, sizes: tuple[int, ...]) -> None:
    given = inputs(kind, *sizes)
    assert looks_back(given) == (sizes[-1] == 64 and kind != "channel")
    outcome(given)  # compiles, which a capture can't
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(given)
    for _ in range(2):  # the second finds what the first has left
        with torch.no_grad():
            for x in given[:3]:
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, outcome(given), strict=True))


@LARGE
@pytest.mark.parametrize("kind", ["none", "channel"])
def test_rows_past_2_to_the_31_elements_are_right(kind: str) -> None:
    T, tail = 1_060_000, 1000
    given = inputs(kind, 1, T, 4, 512, 32)
    assert given[0].numel() > 2**31
    with torch.no_grad():
        if kind == "channel":
            given[3][:, -tail] = -1e4  # what follows doesn't know what came before
        else:
            for x in given[:3]:
                x[:, :-tail] = 0
    whole = outcome(given)
    alone = outcome([x.detach()[:, -tail:].clone().requires_grad_() for x in given])
    for a, b in zip(whole, alone, strict=True):
        error = (a[:, 1 - tail :].double() - b[:, 1:].double()).norm() / b[:, 1:].double().norm()
        assert error < 1e-2


@LARGE
def test_a_million_tokens() -> None:
    given = inputs("channel", 1, 2**20, 4, 128, 256)
    assert all(x.isfinite().all() for x in outcome(given))


def test_the_process_is_usable_after_running_out_of_memory() -> None:
    given = inputs("channel", 1, 4096, 4, 64, 64)
    held = torch.cuda.memory_allocated()
    limit = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((held + 2**22) / limit)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            outcome(given)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(x.isfinite().all() for x in outcome(given))
