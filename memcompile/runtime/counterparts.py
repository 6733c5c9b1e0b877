"""Which optimizer steps the values by rows as the user's own would step them whole, and which options it takes over."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, Optimizer, SparseAdam

from memcompile.config import MemoryConfig
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowOptimizer, RowSGD, RowwiseAdagrad

_BY_NAME: dict[str, type[RowOptimizer]] = {
    "row_adamw": RowAdamW,
    "lazy_adam": LazyAdam,
    "row_wise_adagrad": RowwiseAdagrad,
    "row_sgd": RowSGD,
}


def row_optimizer_in(optimizer: Optimizer, group: dict[str, Any], config: MemoryConfig) -> type[RowOptimizer] | None:
    """The class that steps the values of this group by rows; None where the optimizer has no counterpart by rows."""
    if isinstance(optimizer, RowOptimizer):
        return type(optimizer)
    if config.values_optimizer is not None:
        return _BY_NAME[config.values_optimizer]
    if _steps_as(optimizer, Adam):
        decoupled = group.get("decoupled_weight_decay", False) or not group["weight_decay"]
        dies_out = group["betas"][0] ** 2 < group["betas"][1]  # what momentum does to rows that are not touched
        return RowAdamW if decoupled and dies_out and not group["amsgrad"] and not group["differentiable"] else None
    if _steps_as(optimizer, SGD):
        return None if group["momentum"] or group["differentiable"] else RowSGD
    return None


def takes_sparse_gradients(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether PyTorch's own optimizer steps a sparse gradient as it would the dense one."""
    if _steps_as(optimizer, Adagrad):
        return not group["weight_decay"] and not group.get("fused")
    return _steps_as(optimizer, SparseAdam) or isinstance(optimizer, LBFGS)


def _steps_as(optimizer: Optimizer, kind: type[Optimizer]) -> bool:
    """Whether the step of an optimizer is that of this class: subclasses may have their own."""
    return isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step)


def are_alike(given: Any, default: Any) -> bool:
    """Whether an option of another optimizer is one of ours: Adafactor's eps is a pair."""
    numbers = (int, float, Tensor)
    return isinstance(given, numbers) if isinstance(default, numbers) else isinstance(given, type(default))


def rate_like(lr: Any, rate: float) -> Any:
    """A learning rate of the same kind: capturable optimizers hold it in a tensor."""
    return torch.full_like(lr, rate) if isinstance(lr, Tensor) else rate
