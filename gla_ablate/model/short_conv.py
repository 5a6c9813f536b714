"""The short convolution: each channel sees a few tokens back before the tokens are mixed.

    y_t = swish(Σ_i w_i ⊙ x_{t−W+1+i}),    i = 0 … W − 1,    x = 0 before the first token

The GLA paper's layer has none. FLA has it as an option, off by default, on each of q, k and v, 4 wide, with SiLU and
without bias (`fla/layers/gla.py`). Mamba (arXiv 2312.00752, section 3.4) has one before its recurrence, and DeltaNet
(arXiv 2406.06484) on q, k and v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConv(nn.Module):
    """x `[B,T,channels]` → `[B,T,channels]`: depthwise, causal, then SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))  # drawn by `initialise`, with fan-in `width`

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """`before` `[B,width−1,channels]`: the inputs before x, overwritten with those before the next token."""
        if not x.shape[1]:
            return x
        width = self.weight.shape[1]
        if before is None:
            x = F.pad(x, (0, 0, width - 1, 0))  # [B, width − 1 + T, channels]
        else:
            x = torch.cat([before.to(x.dtype), x], 1)
            before.copy_(x[:, x.shape[1] - width + 1 :])
        return F.silu(F.conv1d(x.mT, self.weight.unsqueeze(1), groups=len(self.weight)).mT)
