"""Which devices and arguments the Triton kernels support."""

import functools
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering.triton.settings import is_interpreted

log = logging.getLogger(__name__)

MAX_TOP_K = 64  # to rank more takes ten seconds to compile and 190 registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def is_gpu(device: torch.device) -> bool:
    """Whether this is a GPU that Triton compiles all of the kernels for: NVIDIA's from Ampere (bf16) on, and ROCm's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def is_installed() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. Asked for a GPU, which otherwise runs PyTorch operators: the log says so once."""
    if not is_installed():
        log.warning("Triton is not installed: memory layers run as PyTorch operators on the GPU, which is slower")
        return False
    return True


def supports(device: torch.device, dtypes: Iterable[torch.dtype] = ()) -> bool:
    """Whether the kernels run on this device (the CPU is one in Triton's interpreter), with tensors of these dtypes."""
    runs = is_gpu(device) or (device.type == "cpu" and is_interpreted())
    return runs and has_triton() and all(not dtype.is_floating_point or dtype in _DTYPES for dtype in dtypes)


def supports_tensors(*args: Any) -> bool:
    """Whether the kernels take the tensors among these arguments: strided, on one device, of no float64."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return are_together(tensors) and supports(tensors[0].device, (tensor.dtype for tensor in tensors))


def supports_search(*args: Any) -> bool:
    """Whether the kernels take the arguments of a search, of which the last is `top_k`."""
    return args[-1] <= MAX_TOP_K and supports_tensors(*args)


def are_together(tensors: Sequence[Tensor]) -> bool:
    """Whether all of the tensors are strided and on one device."""
    return all(tensor.device == tensors[0].device and tensor.layout is torch.strided for tensor in tensors)
