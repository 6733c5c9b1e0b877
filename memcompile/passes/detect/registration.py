"""The proof that parameters can be taken out of a model: plain, registered once, and watched by no hook."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from memcompile.common.sites import common_path
from memcompile.passes.capture.sandbox import HOOKS


class Registration:
    """How a model's parameters are registered."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names: dict[int, set[str]] = collections.defaultdict(set)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[id(parameter)].add(name)

    def refusal(self, replaced: Sequence[str]) -> str | None:
        """Why the way in which these parameters are registered keeps them in the model, None where it does not."""
        for name in replaced:
            parameter = self.model.get_parameter(name)
            names = self._names[id(parameter)]
            if isinstance(self.model.get_submodule(name.rpartition(".")[0]), ParametrizationList):
                return f"{name} is parametrized"
            if not self._is_one_attribute(names):
                return f"{name} is tied to {min(names - {name})}"
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                return f"{name} is a {type(parameter).__name__} of {parameter.dtype}: sharded or quantised weights stay"
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return f"{name} has gradient hooks, which would be lost"
        return self._hook_refusal(replaced)

    def _is_one_attribute(self, names: set[str]) -> bool:
        """Whether the names are one attribute of one module, reached by several paths (a block that layers share)."""
        split = (name.rpartition(".") for name in names)
        return len({(id(self.model.get_submodule(path)), leaf) for path, _, leaf in split}) == 1

    def _hook_refusal(self, replaced: Sequence[str]) -> str | None:
        owner = common_owner(replaced)
        for name in replaced:
            path = name.rpartition(".")[0]
            if path != owner and _has_hooks(self.model.get_submodule(path)):
                return f"module {path!r} has hooks, which would no longer see the projection"
        for path, module in self.model.get_submodule(owner).named_modules(prefix=owner):
            # An activation or a dropout between the projections has no parameters; attention in the same module has.
            bare = not any(True for _ in module.parameters())
            between = bare or any(name.startswith(f"{path}.") for name in replaced)
            if path != owner and between and _has_hooks(module):
                return f"module {path!r} has hooks, which would no longer see the hidden activation"
        return None


def common_owner(parameters: Sequence[str]) -> str:
    """Path of the innermost module that holds all of them."""
    return common_path(name.rpartition(".")[0] for name in parameters)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)
