"""The private PyTorch API of the runtime, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any, TypeVar

import torch
from torch import Tensor, autograd
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._dynamo import OptimizedModule
from torch._dynamo.decorators import mark_unbacked
from torch.autograd import Variable
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["OptimizedModule", "autograd", "clip_grad", "pytree"]  # which are imported for other files


@contextmanager
def at_once() -> Iterator[None]:
    """Run operators on the tensors themselves, whatever traces or transforms what the program does."""
    with (
        torch._C._DisableFuncTorch(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch._C._PreserveDispatchKeyGuard(),
    ):
        # The collector may call us while FakeTensorMode has every operator run on the meta device.
        torch._C._set_meta_in_tls_dispatch_include(False)
        yield


_Function = TypeVar("_Function", bound=Callable)


def never_compiled_alone(function: _Function) -> _Function:
    """Has Dynamo run a function as it is where it is called from Python, with all that it calls. Within what Dynamo
    traces, it is traced.

    `__torch_function__` needs it: Dynamo compares functions by identity, and those that get an attribute of a tensor
    are new objects at each access, so what it compiled for `tensor.device` would run for `tensor.shape`.
    """
    strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, strategy)  # type: ignore[attr-defined]
    return function


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [sparse_dim, nnz] and values [nnz, ...] of a sparse COO tensor, coalesced or not, without a copy."""
    return tensor._indices(), tensor._values()


def after_backward(call: Callable[[], None]) -> None:
    """Has `call()` run when the backward that is running ends, after what others asked for before."""
    Variable._execution_engine.queue_callback(call)  # type: ignore[no-untyped-call]


def has_state_dict_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks of its state dict can be registered: not where a subclass does not call `Optimizer.__init__`."""
    return hasattr(optimizer, "_optimizer_state_dict_pre_hooks")


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    return DTensor.to_local(tensor) if isinstance(tensor, DTensor) else tensor  # as it is stored


def local_offset(tensor: DTensor) -> tuple[int, ...]:
    """Where in the whole tensor this rank's part begins."""
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


@torch.no_grad()
def whole_like(values: Tensor, part: Tensor) -> DTensor:
    """The DTensor that lies as `values`, or as their first dimensions, of which `part` is what this rank holds.

    With a sparse part it passes for a strided tensor, as DTensors with sparse parts are known to nobody: what is done
    with it, by clipping for one, is done with the part.
    """
    assert isinstance(values, DTensor)
    if not part.is_sparse:
        dims, mesh = part.dim(), values.device_mesh
        placements = [Replicate() if isinstance(p, Shard) and p.dim >= dims else p for p in values.placements]
        stride = values.stride()[values.dim() - dims :]
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=values.shape[:dims], stride=stride)
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


def sized_at_run_time(tensor: Tensor) -> Tensor:
    """The tensor, of whose first size graphs assume nothing."""
    mark_unbacked(tensor, 0)
    return tensor


def without_torch_function() -> Any:
    """A context in which functions see no `__torch_function__` of subclasses."""
    return torch._C.DisableTorchFunctionSubclass()


def body_of_step(step: Any) -> CellType | None:
    """Where the step that runs PyTorch's hooks has the step of the class; None where it is no such function, nor wraps
    one. It reads it in each step, after the hooks that come before.
    """
    while step is not None and getattr(step, "__code__", None) is not _RUNS_HOOKS:
        step = getattr(step, "__wrapped__", None)
    return None if step is None else step.__closure__[_RUNS_HOOKS.co_freevars.index("func")]


_RUNS_HOOKS = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which Dynamo of 2.11 takes for true in every trace."""
    return torch.compiler._is_exporting_flag


def fsdp_init() -> Any:
    """The module in which `fully_shard` finds the parameters to shard, by `_get_managed_states`; slow to import."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init

    return _fsdp_init


def pipeline_stage() -> Any:
    """The class of every stage of a pipeline; slow to import."""
    from torch.distributed.pipelining.stage import _PipelineStageBase

    return _PipelineStageBase
