"""The private PyTorch API of the runtime, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import OptimizedModule
from torch.autograd import Variable
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["OptimizedModule", "after_backward", "at_once", "backward_number", "innermost", "sparse_parts"]


@contextmanager
def at_once() -> Iterator[None]:
    """Run operators on the tensors themselves, whatever traces or transforms what the program does."""
    with torch._C._DisableFuncTorch(), _disable_current_modes(), torch.inference_mode(False):
        yield


def innermost(optimizer: Any, pre_hook: int, post_hook: int) -> None:
    """Has these hooks of an optimizer's step, by their ids, run last before the step and first after it."""
    optimizer._optimizer_step_pre_hooks.move_to_end(pre_hook)
    optimizer._optimizer_step_post_hooks.move_to_end(post_hook, last=False)


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [sparse_dim, nnz] and values [nnz, ...] of a sparse COO tensor, coalesced or not, without a copy."""
    return tensor._indices(), tensor._values()


def after_backward(call: Callable[[], None]) -> None:
    """Has `call()` run when the backward that is running ends, after what others asked for before."""
    Variable._execution_engine.queue_callback(call)  # type: ignore[no-untyped-call]


def backward_number() -> int:
    """A number of the backward that is running in this thread; -1 outside of one."""
    return int(torch._C._current_graph_task_id())
