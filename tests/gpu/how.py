"""The two ways to run what is tested, eager and compiled with memcompile's Inductor lowering; and without waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from memcompile.lowering.inductor.graph_pass import inductor_patches

HOW = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def how(function: Callable[..., Any], compiled: bool, dynamic: bool | None = None) -> Callable[..., Any]:
    """`function`, compiled or as it is; `dynamic` as `torch.compile` takes it."""
    if not compiled:
        return function
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=inductor_patches("tests"))


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Inside, a wait for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
