"""`trainer.precision: bf16-true`: weights in bf16, each with a master copy in fp32 that the optimiser works on.

A bf16 number has 8 significant bits: a step of less than 2^-9 of a weight would leave it as it was. So AdamW, with fp32
moments, updates the masters, and the network gets them rounded. A checkpoint holds the masters. Against bf16-mixed, the
residual stream and a step's gradients take half the memory, and no weight is cast on the way; gradients of several
micro-batches add up in fp32.

A gate's parameters stay fp32 and are their own masters, and autocast is on as in bf16-mixed: so whatever a gate
computes it computes as it does there (see `Gate.forward` for why: a slow decay has to survive). All else is in bf16,
norm weights too, for a norm in two dtypes would leave the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gla_ablate.model.gates import Gate


class Masters:
    """The masters of a network's weights; making them turns the weights to bf16.

    After each backward pass `take_gradients`, after each step of the optimiser `write_back`.
    """

    def __init__(self, network: nn.Module) -> None:
        gates = {id(p) for module in network.modules() if isinstance(module, Gate) for p in module.parameters()}
        self.weights = [p for p in network.parameters() if p.requires_grad and id(p) not in gates]
        self.masters = [nn.Parameter(weight.detach().clone()) for weight in self.weights]
        self._of = {id(weight): master for weight, master in zip(self.weights, self.masters, strict=True)}
        for weight in self.weights:
            weight.data = weight.data.bfloat16()

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimiser shall update for it: its master, on the same device, or a gate's parameter itself."""
        master = self._of.get(id(parameter), parameter)
        master.data = master.data.to(parameter.device)
        return master

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the weights' gradients to those of the masters, in fp32, and free them."""
        first, more = list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                first.append((master.grad, weight.grad))
            else:
                more.append((master.grad, weight.grad))
            weight.grad = None
        if first:
            torch._foreach_copy_([total for total, _ in first], [gradient for _, gradient in first])
        if more:
            torch._foreach_add_([total for total, _ in more], [gradient for _, gradient in more])

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the weights, and free the masters' gradients, which have done their part."""
        torch._foreach_copy_([*self.weights], [*self.masters])
        for master in self.masters:
            master.grad = None

    def named(self, module: nn.Module) -> dict[str, Tensor]:
        """The masters under all names that their weights have in the state dict of `module`."""
        names = module.named_parameters(remove_duplicate=False)
        return {name: self._of[id(p)].detach() for name, p in names if id(p) in self._of}

    @torch.no_grad()
    def load(self, module: nn.Module, state: dict[str, Any]) -> None:
        """Take the masters from the state dict of a checkpoint of `module`."""
        for name, master in self.named(module).items():
            master.copy_(state[name])
