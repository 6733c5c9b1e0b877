"""Values for inference alone, in a file or in the CPU's memory: how they are created, and that they stay as they are
when the model is moved, cast or replicated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memcompile.common.sites import VALUES_NAME
from memcompile.config import MemoryConfig
from memcompile.errors import PlanError
from memcompile.lowering.parameters import new_values, values_shape
from memcompile.runtime.storage.mapped_values import open_values

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel reads


def create_values(config: MemoryConfig, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """The table [slots, value_dim] of a new memory: drawn, or of the file that the options name.

    Raises:
        PlanError: the file is not there, not whole, or of another table.
    """
    if config.values_storage == "mmap":
        assert config.values_path is not None
        return open_values(config.values_path, values_shape(config), dtype)
    if config.values_storage == "host":
        values = new_values(config, dtype, torch.device("cpu"))
        values.requires_grad_(False)
        return values
    return new_values(config, dtype, device)


def holder_of(root: nn.Module) -> tuple[str, nn.Module]:
    """The module that the values of a planned model are a parameter of, and its name in the model."""
    return next((name, module) for name, module in root.named_modules() if VALUES_NAME in module._parameters)


def keep_in_place(root: nn.Module) -> None:
    """Makes the model's ``to()``, ``half()``, ``to_empty()`` and the like leave the values as they are, and DDP too,
    of the model or of a part of it.
    """
    path, holder = holder_of(root)
    vars(holder)["_apply"] = functools.partial(_apply_to_the_rest, holder)
    names = [*path.split("."), VALUES_NAME] if path else [VALUES_NAME]
    for depth in range(len(names)):
        module, name = root.get_submodule(".".join(names[:depth])), ".".join(names[depth:])
        setattr(module, _DDP_IGNORES, [*getattr(module, _DDP_IGNORES, ()), name])


def _apply_to_the_rest(holder: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    values = holder._parameters[VALUES_NAME]
    holder._parameters[VALUES_NAME] = None  # its place is kept: the order of parameters is that of checkpoints
    try:
        module: nn.Module = type(holder)._apply(holder, fn, recurse)  # type: ignore[no-untyped-call]
        return module
    finally:
        holder._parameters[VALUES_NAME] = values


def refuse_gradient(values: nn.Parameter) -> None:
    """Raises PlanError if frozen values were given a gradient: an optimizer is about to step them."""
    if values.grad is not None:
        raise PlanError(
            f"{VALUES_NAME} has a gradient, but its values are for inference and are not stepped: take it out of the "
            f"optimizer, or plan with values_storage='device' to train it"
        )
