"""What a forward pass keeps for the backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gla_ablate.ops.kernels.call import Call
from gla_ablate.ops.kernels.common import CHANNEL, TOKEN


class Saved(NamedTuple):
    """What a forward pass knows and the backward pass needs: the scores `[tiles, HQ, BT, BT]` (empty where scans form
    their own), the states `[chunks, H, V, K]`, and for gates on channels q and k with the decay to their tile's
    borders, `[tiles, HQ, BT, K]` and `[tiles, H, BT, K]`, what whole tiles and their halves let through, `[tiles, H,
    K]` and `[tiles, H, 2, K]`, which tiles are steep (1; 2 and more: they may have steps to cut), and the matrices of
    `survey_kernel`; as `decay` for gates a token what `kept_row_decay` takes, `[tiles, H, 2, BT]`; where packed
    sequences lie, as `Call.memory` holds it. HQ: the heads of q."""

    scores: Tensor
    states: Tensor | None
    read: Tensor
    write: Tensor
    decay: Tensor | None
    halves: Tensor | None
    steep: Tensor | None
    sums: Tensor | None
    packing: Tensor | None


def room(call: Call) -> Saved:
    """Memory for all of `Saved` but the states."""
    _, _, H, K, _ = call.shape
    scores = call.new(0)
    if not call.own_scores:
        scores = call.new(call.tiles, call.heads, call.bt, call.bt, dtype=torch.float32 if call.valued else None)
    packing = None if call.cu_seqlens is None else call.memory
    if call.kind != CHANNEL:
        decay = call.new(call.tiles, H, 2, call.bt, dtype=torch.float32) if call.kind == TOKEN else None
        return Saved(scores, None, call.q, call.k, decay, None, None, None, packing)
    qg, kg = call.new(call.tiles, call.heads, call.bt, K), call.new(call.tiles, H, call.bt, K)
    decay = call.new(call.tiles, H, K, dtype=torch.float32)
    halves = call.new(call.tiles, H, 2, K, dtype=torch.float32)
    steep = call.new(call.tiles, H, dtype=torch.int32)
    sums = call.new(call.matrices, call.bt, call.bt)
    return Saved(scores, None, qg, kg, decay, halves, steep, sums, packing)
