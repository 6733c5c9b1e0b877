"""What the tests of values that are stepped by rows share: small models, their training, and the dense one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tests.planned import batch, planned_gpt

SIZES: dict[str, Any] = {"n_keys": 16, "memory_layers": 2}
Training = Callable[[nn.Module], Any]


@functools.cache
def _planned(**options: Any) -> nn.Module:
    return planned_gpt(**options).double()


def model_of(values_grad: str, **options: Any) -> nn.Module:
    return copy.deepcopy(_planned(values_grad=values_grad, **SIZES | options))


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1} | options)


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> nn.Module:
    for step in steps:
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()
    return model


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(99)[0])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def assert_as_dense(training: Training, tolerance: float = 1e-10, **options: Any) -> None:
    """The same training gives the same numbers (tensors, or models) as with values_grad="dense", but for rounding."""
    results = []
    for values_grad in ("sparse", "dense"):
        torch.manual_seed(0)
        result = training(model_of(values_grad, **options))
        results.append(snapshot(result) if isinstance(result, nn.Module) else result)
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)
