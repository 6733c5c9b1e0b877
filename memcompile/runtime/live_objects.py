"""The objects of a class in this process, of which nobody keeps a list."""

from __future__ import annotations

import gc
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def live_objects(kind: type[T]) -> list[T]:
    """All of a class, and of classes derived from it."""
    # type(o), not isinstance: a lazy proxy's __class__ may import half a library
    return [o for o in gc.get_objects() if issubclass(type(o), kind)]


def is_in_ddp(root: nn.Module) -> bool:
    """Whether some DistributedDataParallel wraps this module."""

    def found() -> bool:
        return any(vars(ddp).get("_modules", {}).get("module") is root for ddp in live_objects(DistributedDataParallel))

    if not found():
        return False
    gc.collect()  # one that was dropped, and is only reached by itself
    return found()
