"""Lightning's view of a trial on several devices, and FSDP (`torch.distributed.fsdp.fully_shard`): each process keeps
1/world of every weight, its gradient and AdamW's moments.

A block's weights are gathered before it runs, forward and backward, and let go of after it; its gradients are summed
and scattered as they come. Embedding, final norm and head are one more group, which stays from forward to backward.
A checkpoint is that of one device, whatever the strategy: whole tensors, the optimiser's by its own numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from gla_ablate.checkpoint import read_checkpoint
from gla_ablate.config import TrainerConfig
from gla_ablate.distributed import Group
from gla_ablate.model import LanguageModel


class Connected(ClusterEnvironment):
    """The processes of a group that are connected already: nothing is left for Lightning to start."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    creates_processes_externally = True
    main_address, main_port = "", 0  # nobody asks any more

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.group.world

    def global_rank(self) -> int:
        return self.group.rank

    def local_rank(self) -> int:
        return self.group.local

    def node_rank(self) -> int:
        return self.group.node

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


def strategy(trainer: TrainerConfig) -> Strategy:
    """Of a trial on several devices."""
    if trainer.strategy == "fsdp":
        return Sharded(trainer.processes)
    return DDPStrategy(gradient_as_bucket_view=True)  # every parameter has a gradient in every step: none is looked for


def shard(model: LanguageModel, mesh: DeviceMesh, bf16: bool) -> None:
    """Leave this process its share of the weights, in place; `model` and `model.hidden` are called as before.

    With `bf16` weights are gathered, and a block computes, in bf16, and so is what passes between blocks; weights and
    moments stay in fp32, and gradients are summed in it.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in () if shares_weights(model) else model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # the loss reads the head's weight
    register_fsdp_forward_method(model, "hidden")


def shares_weights(model: LanguageModel) -> bool:
    """Whether blocks have a parameter in common, as gates may: it has to be of one group, which is then the model."""
    owners = Counter(id(p) for block in model.blocks for p in block.parameters())
    return any(count > 1 for count in owners.values())


class Sharded(ModelParallelStrategy):
    """FSDP over all processes. Lightning's own checkpoints would number the optimiser's states by the order of the
    model's parameters, which isn't that of the optimiser's groups."""

    lightning_restore_optimizer = True

    def __init__(self, world: int) -> None:
        super().__init__(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._whole(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def _whole(self, x: Any) -> Any:
        """`x`, with the tensors in it whole and on the host; in the first process alone, though all take part."""
        if isinstance(x, dict):
            return {key: self._whole(value) for key, value in x.items()}
        if isinstance(x, DTensor):
            whole = x.full_tensor()
            return whole.cpu() if self.is_global_zero else None
        return x

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        with torch.no_grad():
            for name, x in checkpoint["state_dict"].items():
                own[name].copy_(part(x, own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in whole["param_groups"] for number in group["params"]]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: part(x, p) if x.shape == p.shape else x for name, x in whole["state"][number].items()}
                for number, p in zip(numbers, parameters, strict=True)
                if number in whole["state"]
            }
            optimizer.load_state_dict({**whole, "state": state})


def part(whole: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has, this one's share, cut as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
