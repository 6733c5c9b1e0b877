"""Which calls of an operator the Triton kernels serve, eager and in graphs."""

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import is_keyed
from memcompile.lowering.triton.settings import is_interpreted

log = logging.getLogger(__name__)

MAX_TOP_K = 64  # to rank more takes ten seconds to compile and 190 registers
_NUMBERS = 9  # the place of row_adam's
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Operators that graphs keep whole because Inductor lowers them to templates: see `template.py` beside this.
TEMPLATED: set[str] = set()


@functools.cache
def is_gpu(device: torch.device) -> bool:
    """Whether this is a GPU that Triton compiles all of the kernels for: NVIDIA's from Ampere (bf16) on, and ROCm's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. Where it is not, a GPU runs memory layers as PyTorch operators, said once."""
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: memory layers run as PyTorch operators on the GPU, which is slower")
        return False
    return True


def serves(device: torch.device, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether the kernels run on this device (the CPU is one in Triton's interpreter), with tensors of these dtypes."""
    runs = is_gpu(device) or (device.type == "cpu" and is_interpreted())
    return runs and has_triton() and all(not dtype.is_floating_point or dtype in _DTYPES for dtype in dtypes)


def gpu_kernel(name: str, *args: Any) -> Callable[..., Any] | None:
    """What runs operator `name` on a GPU, or None where its kernels serve no such arguments: tensors of float64, of a
    layout that is not strided, on no GPU or on several devices, or more slots a head than they hold.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    device = tensors[0].device
    if not serves(device, (tensor.dtype for tensor in tensors)):
        return None
    if any(tensor.device != device or tensor.layout is not torch.strided for tensor in tensors):
        return None
    if name in ("product_key_search", "product_key_topk") and args[-1] > MAX_TOP_K:
        return None
    from memcompile.lowering.triton import launch  # imports Triton, which only a GPU needs

    kernel: Callable[..., Any] = getattr(launch, name)
    return kernel


def row_kernel(name: str, *args: Any) -> Callable[..., None] | None:
    """What runs operator `name`, which updates rows in place, on a GPU; None where no kernel serves such arguments.
    float64 is served too. `row_adam` has its numbers on the CPU, and everything else where the values are.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    device = tensors[0].device
    if not serves(device, ()):
        return None
    elsewhere = [tensor for tensor in tensors if tensor.device != device or tensor.layout is not torch.strided]
    if any(name != "row_adam" or tensor is not args[_NUMBERS] for tensor in elsewhere):
        return None
    from memcompile.lowering.triton import launch

    kernel: Callable[..., None] | None = getattr(launch, name, None)
    if kernel is not None and len(args) > len(inspect.signature(kernel).parameters):  # a gradient in factors
        return None
    return kernel


def graph_kernel(name: str, *args: Any) -> Callable[..., Any] | None:
    """What a graph that is compiled holds in the place of operator `name`; None where it holds the operator itself."""
    if name in TEMPLATED or is_interpreted() or not is_keyed():
        return None
    kernel = gpu_kernel(name, *args)
    if kernel is None:
        return None
    from memcompile.lowering.triton.launch import traced

    return traced(kernel)
