"""Which devices and arguments the Triton kernels support, and what the environment asks of them."""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MAX_TOP_K = 64  # to rank more takes ten seconds to compile and 190 registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ON = ("1", "on", "true", "yes")


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _ON


def uses_atomics() -> bool:
    """Whether gradients of rows are summed by fp32 atomics (``MEMCOMPILE_ATOMICS=1``): the sums then differ in their
    last bits from run to run.
    """
    return os.environ.get("MEMCOMPILE_ATOMICS", "").lower() in _ON


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
    return _are_together(tensors) and supports(tensors[0].device, (tensor.dtype for tensor in tensors))


def supports_search(*args: Any) -> bool:
    """Whether the kernels take the arguments of a search, of which the last is `top_k`."""
    return args[-1] <= MAX_TOP_K and supports_tensors(*args)


def supports_update(*args: Any) -> bool:
    """Whether the kernels take the arguments of an update of rows, of tables in float64 too. The last of them is no
    table: it is a number, or those of `row_adam`, on the CPU.
    """
    tensors = [arg for arg in args[:-1] if isinstance(arg, Tensor)]
    return _are_together(tensors) and supports(tensors[0].device)


def _are_together(tensors: Sequence[Tensor]) -> bool:
    """Whether all of the tensors are strided and on one device."""
    return all(tensor.device == tensors[0].device and tensor.layout is torch.strided for tensor in tensors)


def say_unknown_inductor(error: Exception) -> None:
    """Logs that this version of torch has no Inductor that `_inductor` runs on."""
    log.warning(
        "torch %s is not a version whose Inductor is known (%s): memory layers run, but their gate is not fused",
        torch.__version__, error,
    )  # fmt: skip
