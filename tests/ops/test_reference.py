"""The forms of the paper agree with its recurrence, in fp64, for every kind and strength of gate."""

import pytest
import torch

from gla_ablate.ops import gated_linear_attention
from gla_ablate.ops.reference import chunkwise, parallel, recurrent, two_level
from tests.ops.cases import KINDS, STRENGTHS, Case, inputs

FORMS = {
    "parallel": parallel,
    "chunkwise": lambda *args, **kwargs: chunkwise(*args, chunk=16, **kwargs),
    "two_level": lambda *args, **kwargs: two_level(*args, chunk=32, block=8, **kwargs),
    "torch backend": lambda *args, **kwargs: gated_linear_attention(
        *args, chunk_size=32, backend="torch", output_final_state=True, **kwargs
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [0, 1, 45])
def test_forms_agree(form: str, kind: str, strength: str, T: int) -> None:
    case = Case(kind=kind, strength=strength, B=2, T=T, K=6, V=5)
    given, _ = inputs(case)
    args = [given[name] for name in ("q", "k", "v", "g")]
    options = {"scale": 0.3, "initial_state": given["initial_state"]}
    o, state = FORMS[form](*args, **options)
    want_o, want_state = recurrent(*args, **options)
    # a difference of running sums, as the parallel form takes, keeps 1e-16 · T · 1e4 of an exponent
    torch.testing.assert_close(o, want_o, rtol=0, atol=1e-9)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-9)
