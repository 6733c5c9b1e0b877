"""One forward pass of a module, on fake tensors or on copies of the real ones."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from memcompile.passes._torch import FakeTensorMode, pytree
from memcompile.passes.capture.guess import Arguments
from memcompile.passes.capture.sandbox import restored_afterwards

_SMALL = 2**29  # numbers in a model that may be copied to run it once


@dataclasses.dataclass(frozen=True)
class Forward:
    """How a module is run.

    Attributes:
        arguments: of the call. Only shapes and dtypes of tensors are read, unless the call computes.
        compute: run on copies of the real tensors: some paths depend on values (the tokens of an image, a router's
            choice), and some operators have no fake kernel for every dtype.
        training: run in train mode, or in eval mode, whatever mode the module is in; None is the module's own.
        device: of the tensors in the arguments.
    """

    arguments: Arguments
    compute: bool = False
    training: bool | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def run(self, module: nn.Module, through: Callable[[Callable], Callable] = lambda function: function) -> Any:
        """``through(f)(parameters, buffers, args, kwargs)``, where ``f`` returns the tensors that ``module`` returns.
        Leaves the module as it was.
        """

        def call(parameters: dict, buffers: dict, args: tuple, kwargs: dict) -> list[Tensor]:
            output = functional_call(module, parameters | buffers, args, kwargs)
            return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

        def argument(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            if self.compute and not leaf.is_meta:
                return _copy(leaf)
            tensor = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=self.device)
            return tensor.fill_(1) if self.compute else tensor

        with restored_afterwards(module, self.compute) as mode:

            def as_input(name: str, tensor: Tensor) -> Tensor:
                if not isinstance(mode, FakeTensorMode):
                    return _copy(tensor)
                fake = mode.from_tensor(tensor)
                if fake.is_meta and is_dispatched(module, name.rpartition(".")[0]):
                    return fake.to(self.device).detach().requires_grad_(fake.requires_grad)
                return fake

            parameters = {name: as_input(name, p) for name, p in module.named_parameters()}
            buffers = {name: as_input(name, b) for name, b in module.named_buffers()}
            if self.training is not None:
                for inner in module.modules():  # not eval(), which may be the owner's own and change weights
                    inner.training = self.training
            with mode:
                args, kwargs = pytree.tree_map(argument, (self.arguments.args, self.arguments.kwargs))
                # What it sets in context variables, it sets in a copy of the context.
                return contextvars.copy_context().run(through(call), parameters, buffers, args, kwargs)


def is_dispatched(model: nn.Module, path: str) -> bool:
    """Whether a hook of accelerate's fetches weights of this module to where they are computed with, when the module,
    or one around it, runs.
    """
    parts = path.split(".") if path else []
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))
    return any("_hf_hook" in module.__dict__ for module in around)


def can_compute(model: nn.Module) -> bool:
    """Whether the model is real, and small enough to run a copy of it."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(t.is_meta for t in tensors) and sum(t.numel() for t in tensors) <= _SMALL


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
