"""The objects of a class in this process, of which nobody keeps a list."""

from __future__ import annotations

import gc
from typing import TypeVar

from torch.optim import Optimizer

T = TypeVar("T")


def live_objects(kind: type[T]) -> list[T]:
    """All of a class, and of classes derived from it."""
    # type(o), not isinstance: a lazy proxy's __class__ may import half a library
    return [o for o in gc.get_objects() if issubclass(type(o), kind)]


def live_optimizers() -> list[Optimizer]:
    """Every optimizer of the process that has groups: some are wrappers, or half built."""
    return [optimizer for optimizer in live_objects(Optimizer) if hasattr(optimizer, "param_groups")]
