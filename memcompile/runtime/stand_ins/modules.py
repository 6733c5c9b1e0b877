"""Modules that held the parameters of replaced FFNs: their list, and the class of those that were an `nn.Linear`.

Tools that walk a model for `nn.Linear` (quantisation, pruning, LoRA, a program's initialisation) would find one whose
weight is gone. A `ReplacedLinear` is none, so they pass it by.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from memcompile.errors import PlanError
from memcompile.runtime.stand_ins.operations import StandIn


class ReplacedLinear(nn.Module):
    """An `nn.Linear` whose parameters were replaced. The owner's code calls it as before."""

    in_features: int
    out_features: int
    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Does nothing: there is nothing to draw. The memory layer has a method of this name."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raises PlanError for a parameter made of a replaced one, as `torch.nn.utils.prune` makes it."""
        if isinstance(param, StandIn):
            raise PlanError(
                f"{param!r} cannot be made {name!r}: a memory replaced it; memcompile.replaced_modules(model) lists "
                f"the modules to leave out, and memory_layers without this block keeps it"
            )
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """Errors of tools that were pointed at the module show it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}: a memory replaced its parameters; "
            f"memcompile.replaced_modules(model) lists such modules"
        )


def mark_replaced(module: nn.Module) -> None:
    """Gives an `nn.Linear` all of whose parameters are gone its class; not a subclass, which may do more."""
    if type(module) is nn.Linear and not any(p is not None for p in module._parameters.values()):
        setattr(module, "__class__", ReplacedLinear)  # noqa: B010
        vars(module)["__module__"] = nn.Linear.__module__  # by which torch.fx knows what it does not trace into


def replaced_modules(model: nn.Module) -> list[str]:
    """The names of the modules whose parameters a memory replaced, in the order of `model.named_modules()`: what a tool
    that changes projections leaves out, for example PEFT by ``LoraConfig(exclude_modules=...)``. Empty for a model that
    is not planned, or to which memory was added.
    """
    return [
        name for name, module in model.named_modules() if any(isinstance(v, StandIn) for v in vars(module).values())
    ]
