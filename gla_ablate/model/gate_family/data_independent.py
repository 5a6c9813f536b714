"""Gates that don't look at the input: no decay, fixed decays, learned ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gla_ablate.errors import ConfigError
from gla_ablate.model.gates import Gate, GateShape, register_gate


class ConstantGate(Gate):
    """A decay a head that nothing changes."""

    decay_shape = "[H]"

    g: Tensor

    def __init__(self, decays: list[float]) -> None:
        super().__init__()
        # Plain numbers: arithmetic on meta tensors, as in `count_parameters`, costs a second of imports inside torch.
        self.register_buffer("g", torch.tensor(decays), persistent=False)  # [H]

    def forward(self, x: Tensor) -> Tensor:
        return self.g


@register_gate("none")
class NoGate(Gate):
    """Linear attention as it was before gates: the state only ever grows.

    Left out: the feature map and the normaliser of that paper.
    """

    formula = "no decay"
    decay_shape = "none"
    source = "linear attention, arXiv 2006.16236"

    def __init__(self, shape: GateShape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> None:
        return None


@register_gate("fixed_decay")
class FixedDecayGate(ConstantGate):
    """RetNet's decay: a constant a head, slower from head to head; nothing to learn.

    Left out: its rotary positions, which `model.rope` adds.
    """

    formula = "g_h = log(1 − 2^(−5−h))"
    source = "RetNet, arXiv 2307.08621, section 2.1"

    def __init__(self, shape: GateShape) -> None:
        super().__init__([math.log1p(-(2.0 ** (-5 - head))) for head in range(shape.heads)])


@register_gate("layerwise_decay")
class LayerwiseDecayGate(ConstantGate):
    """TransNormerLLM's decay: a constant a head and layer. Heads are h = 0 … H − 1 and layers l = 1 … L, as there: head
    0 forgets nothing in any layer, no head does in the last one, and the lower a layer, the faster it forgets. All
    layers of the model count, those without a gate too. A model of one layer has no decay.

    Left out: its learned angles of positions (LRPE) and swish on q and k.
    """

    formula = "g_hl = −(8h/H) (1 − l/L)"
    source = "TransNormerLLM, arXiv 2307.14995, equation 2 (λ)"

    def __init__(self, shape: GateShape) -> None:
        higher = 1 - (shape.layer + 1) / shape.layers  # the share of layers above this one
        super().__init__([-8 * head / shape.heads * higher for head in range(shape.heads)])


@register_gate("learned_decay")
class LearnedDecayGate(Gate):
    """RWKV-5's decay: learned, one a key channel, the same for all tokens. It starts as there: channels n = 0 … HK − 1
    from `slowest` to `fastest`, spaced by a power that rises over layers, so that more of a higher layer is slow. The
    defaults are memories of 403 to 2.7 tokens.

    Left out: its bonus for the current token, token shift, and the delay of the decay by a token that goes with it.
    """

    formula = "g_n = −exp(w_n)"
    decay_shape = "[B,T,H,K]"
    source = "Eagle (RWKV-5), arXiv 2404.05892, section 4"

    def __init__(self, shape: GateShape, *, slowest: float = -6.0, fastest: float = -1.0) -> None:
        super().__init__()
        for name, given in (("slowest", slowest), ("fastest", fastest)):
            if not -20 <= given <= 5:
                raise ConfigError(f"model.gate.{name}: got {given}, takes a number from -20 to 5 (of g = −exp(w))")
        if slowest > fastest:
            raise ConfigError(f"model.gate.slowest: got {slowest}, takes at most model.gate.fastest, {fastest}")
        self.heads = shape.heads
        channels, power = shape.heads * shape.key_dim, 0.7 + 1.3 * shape.layer / max(shape.layers - 1, 1)
        spread = [(n / max(channels - 1, 1)) ** power for n in range(channels)]
        self.w = nn.Parameter(torch.tensor([slowest + (fastest - slowest) * s for s in spread]))  # [H · K]

    def forward(self, x: Tensor) -> Tensor:
        g = -self.w.float().exp().unflatten(0, (self.heads, -1))  # [H, K]
        return g.repeat(*x.shape[:2], 1, 1)  # [B, T, H, K]; the kernels would copy an expanded one all the same
