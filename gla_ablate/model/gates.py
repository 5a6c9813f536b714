"""The gate of a gated-linear-attention layer: what varies in an ablation, and the registry that names the variants
(`gate_family/` has those that come with this package).

A gate maps the layer's input to the log forget gate g ≤ 0 of the recurrence

    S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t,    o_t = scale · q_t S_t        (arXiv 2312.06635, section 4.1; α = exp(g))

and may rewrite k and v on the way, or make k itself. The forget gates of published models differ in what g depends on
and in its shape:

    none         g is None            linear attention, nothing is forgotten
    [H]          one number a head    RetNet, TransNormerLLM
    [B,T,H]      a head and token     Mamba-2, gated RetNet
    [B,T,H,K]    a key channel too    GLA, HGRN2

and in whether there is a second one, gv `[B,T,H,V]`, on the channels of v, under which columns of S decay as its rows
do under g.

The keyword-only parameters of a gate's `__init__` are its options in YAML (`registry.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from gla_ablate.errors import ConfigError
from gla_ablate.registry import Registry

VALUED = "[B,T,H,K], [B,T,H,V]"  # g and gv
DECAY_SHAPES = ("none", "[H]", "[B,T,H]", "[B,T,H,K]", VALUED)
Decay = Tensor | None | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GateShape:
    """What a gate is told of its layer. `key_dim` (K) and `value_dim` (V) are per head; `layer` counts from 0."""

    dim: int
    heads: int
    key_dim: int
    value_dim: int
    layer: int
    layers: int


class Gate(nn.Module):
    """Base of all gates. A subclass states `decay_shape`, defines `forward` and registers itself:

        @register_gate("my_gate")
        class MyGate(Gate):
            decay_shape = "[B,T,H]"
            def __init__(self, shape: GateShape, *, floor: float = 0.9) -> None: ...
            def forward(self, x): ...

    Its parameters may be initialised with any of torch's functions: the model seeds the generator for each layer's
    gate, so that they depend on the seed and the layer alone. What is no matrix of a product should be a vector: the
    optimiser decays parameters with two dimensions or more, and `flops_per_token` takes them for matrices that each
    token meets.
    """

    formula: ClassVar[str] = ""  # the gate in a line, for --list-gates
    decay_shape: ClassVar[str]  # one of DECAY_SHAPES
    source: ClassVar[str] = ""  # where it was published
    own_keys: ClassVar[bool] = False  # whether `keys` gives k: the layer then has no projection for it

    def __init__(self) -> None:
        super().__init__()
        self.shared: nn.Module | None = None  # what `build_shared` returned: set by the model after construction

    @classmethod
    def build_shared(cls, shape: GateShape) -> nn.Module | None:
        """Parameters that the gates of all layers share; called once a model, with the shape of layer 0.
        Each gate finds them under `self.shared`."""
        return None

    def forward(self, x: Tensor) -> Decay:
        """x [B,T,dim] → g ≤ 0, fp32, in the shape that `decay_shape` states (None for "none"); (g, gv) where it states
        two."""
        raise NotImplementedError

    def keys(self, g: Tensor | None) -> Tensor:
        """k [B,T,H,K] of a gate with `own_keys`, from what its `forward` gave."""
        raise NotImplementedError

    def transform(self, g: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k [B,T,H,K] and v [B,T,H,V] as the recurrence shall see them; as they are by default. g: without gv."""
        return k, v


GATES: Registry[Gate] = Registry("gate")
DIMENSIONS = dict(zip(DECAY_SHAPES, (None, 1, 3, 4, 4), strict=True))  # of g


def both(decay: Decay) -> tuple[Tensor | None, Tensor | None]:
    """g and gv of what a gate gives."""
    return decay if isinstance(decay, tuple) else (decay, None)


def as_stated(gate: Gate, decay: Decay) -> tuple[Tensor | None, Tensor | None]:
    """`both`, if they are what the gate states: else a forgotten `return` would train as no gate at all.
    Raises `ValueError`; the rest of a shape is the op's to check."""
    stated = getattr(gate, "decay_shape", None)  # of a gate that isn't registered, perhaps nothing
    if isinstance(decay, tuple) and len(decay) == 2 and decay[1] is None and stated != VALUED:
        decay = decay[0]
    given = decay if isinstance(decay, tuple) else (decay,)
    wanted = 2 if stated == VALUED else 1
    dimensions = [x.dim() if isinstance(x, Tensor) else None for x in given]
    known = all(x is None or isinstance(x, Tensor) for x in given)  # the op says what else it got
    if stated is not None and known and dimensions != [DIMENSIONS[stated]] * wanted:
        got = ", ".join("None" if x is None else str(list(x.shape)) for x in given)
        raise ValueError(f"gate {type(gate).__name__}: gave {got}, states decay_shape {stated!r}")
    return both(decay)


def register_gate(name: str) -> Callable[[type[Gate]], type[Gate]]:
    """Class decorator that makes a gate usable as `model.gate.name`. Raises `ConfigError` for a name that another class
    holds and for a `decay_shape` that isn't one of `DECAY_SHAPES`."""

    def add(cls: type[Gate]) -> type[Gate]:
        stated = getattr(cls, "decay_shape", None)
        if stated not in DECAY_SHAPES:
            raise ConfigError(f"gate {name!r}: decay_shape is {stated!r}, takes one of {', '.join(DECAY_SHAPES)}")
        return GATES.register(name)(cls)

    return add
