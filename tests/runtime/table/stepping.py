"""What the tests of a table share: small models, their training, and the same training by PyTorch's own optimizers."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from memcompile.runtime.pool import pool_of
from memcompile.runtime.table.current_values import stored
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


def stored_values(model: nn.Module) -> Tensor:
    """A copy of the rows as they are stored, some of which may have missed steps."""
    return stored(pool_of(model).table.part).clone()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


@contextlib.contextmanager
def stepped_by_pytorch() -> Iterator[None]:
    """Models that are planned or copied in here have tables that no hook steps: they are parameters as any other."""
    with mock.patch("memcompile.runtime.pool.watch_optimizers"):
        yield


def is_oracle(model: nn.Module) -> bool:
    """Whether a training is that of PyTorch, to compare with."""
    pool = pool_of(model)
    assert pool is not None
    return pool.table.gradient == "dense"


def assert_as_dense(training: Training, tolerance: float = 1e-10, **options: Any) -> None:
    """The same training gives the same numbers (tensors, or models) as with dense gradients, but for rounding.

    PyTorch's own optimizers step the dense table. They know no `values_lr`: where one is asked for, the table steps
    itself there too.
    """
    options = {"values_lr": None} | options
    by_pytorch = stepped_by_pytorch() if options["values_lr"] is None else contextlib.nullcontext()
    torch.manual_seed(0)
    sparse = _numbers(training(model_of("sparse", **options)))
    torch.manual_seed(0)
    with by_pytorch:
        dense = _numbers(training(model_of("dense", **options)))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=tolerance)


def _numbers(result: Any) -> Any:
    return snapshot(result) if isinstance(result, nn.Module) else result
