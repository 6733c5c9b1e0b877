"""Values that are for inference alone, in a file or in the CPU's memory: how they are made, and stay where they are
while the model is moved, cast or replicated.
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


def keep_in_place(root: nn.Module) -> None:
    """Has the model's ``to()``, ``half()``, ``to_empty()`` and the like pass the values by, and DDP too."""
    vars(root)["_apply"] = functools.partial(_apply_to_the_rest, root)
    ignored = [*getattr(root, _DDP_IGNORES, ()), VALUES_NAME]
    setattr(root, _DDP_IGNORES, ignored)


def _apply_to_the_rest(root: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    values = root._parameters[VALUES_NAME]
    root._parameters[VALUES_NAME] = None  # its place is kept: the order of parameters is that of checkpoints
    try:
        module: nn.Module = type(root)._apply(root, fn, recurse)  # type: ignore[no-untyped-call]
        return module
    finally:
        root._parameters[VALUES_NAME] = values


def refuse_gradient(values: nn.Parameter) -> None:
    """Raises PlanError if somebody gave frozen values a gradient: an optimizer is about to step them."""
    if values.grad is not None:
        raise PlanError(
            f"{VALUES_NAME} has a gradient, but its values are for inference and are not stepped: take it out of the "
            f"optimizer, or plan with values_storage='device' to train it"
        )
