"""The proof that parameters can be taken out of a model: plain, registered once, and watched by no hook."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from memcompile.common.sites import common_path
from memcompile.passes.capture.sandbox import HOOKS


def tied_names(model: nn.Module) -> dict[int, set[str]]:
    """Every name of each parameter of a model, by the parameter's identity."""
    names: dict[int, set[str]] = collections.defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return names


def registration_refusals(model: nn.Module, replaced: Sequence[str], tied: Mapping[int, set[str]]) -> Iterator[str]:
    """Why the way in which these parameters are registered keeps them in the model."""
    owner = common_owner(replaced)
    for name in replaced:
        parameter, path = model.get_parameter(name), name.rpartition(".")[0]
        if isinstance(model.get_submodule(path), ParametrizationList):
            yield f"{name} is parametrized"
        split = (other.rpartition(".") for other in tied[id(parameter)])  # of one attribute, where layers share a block
        if len({(id(model.get_submodule(module)), leaf) for module, _, leaf in split}) > 1:
            yield f"{name} is tied to {min(tied[id(parameter)] - {name})}"
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            yield f"{name} is a {type(parameter).__name__} of {parameter.dtype}: sharded or quantised weights stay"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield f"{name} has gradient hooks, which would be lost"
    for path in (name.rpartition(".")[0] for name in replaced):
        if path != owner and _has_hooks(model.get_submodule(path)):
            yield f"module {path!r} has hooks, which would no longer see the projection"
    for path, module in model.get_submodule(owner).named_modules(prefix=owner):
        # An activation or a dropout between the projections has no parameters; attention in the same module has.
        bare = not any(True for _ in module.parameters())
        between = bare or any(name.startswith(f"{path}.") for name in replaced)
        if path != owner and between and _has_hooks(module):
            yield f"module {path!r} has hooks, which would no longer see the hidden activation"


def common_owner(parameters: Sequence[str]) -> str:
    """Path of the innermost module that holds all of them."""
    return common_path(name.rpartition(".")[0] for name in parameters)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)
