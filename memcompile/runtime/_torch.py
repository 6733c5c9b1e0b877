"""The private PyTorch API of the runtime, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, autograd
from torch._dynamo import OptimizedModule
from torch._dynamo.decorators import mark_unbacked
from torch.autograd import Variable
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "OptimizedModule",
    "after_backward",
    "at_once",
    "autograd",
    "backward_number",
    "clip_grad",
    "fsdp_init",
    "innermost",
    "local_part",
    "sized_at_run_time",
    "sparse_parts",
    "whole_like",
]

_NO_SIZE = 1_000_003  # what a size that is known at run time alone looks like until then


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


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_like(values: DTensor, part: Tensor) -> DTensor:
    """The DTensor that lies as `values`, of which `part` is what this rank holds.

    With a sparse part it passes for a strided tensor, as DTensors with sparse parts are known to nobody: what is done
    with it, by clipping for one, is done with the part.
    """
    if not part.is_sparse:
        return DTensor.from_local(
            part, values.device_mesh, values.placements, run_check=False, shape=values.shape, stride=values.stride()
        )
    whole: DTensor = torch.Tensor._make_wrapper_subclass(
        DTensor,
        values.shape,
        strides=values.stride(),
        dtype=part.dtype,
        device=part.device,
        layout=torch.strided,
        requires_grad=False,
    )
    whole._spec, whole._local_tensor = values._spec, part
    return whole


def sized_at_run_time() -> Tensor:
    """A tensor of no numbers, of whose first size graphs assume nothing."""
    tensor = torch.empty(1).expand(_NO_SIZE)
    mark_unbacked(tensor, 0)
    return tensor


def fsdp_init() -> Any:
    """The module in which `fully_shard` finds the parameters to shard, by `_get_managed_states`; slow to import."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init

    return _fsdp_init
