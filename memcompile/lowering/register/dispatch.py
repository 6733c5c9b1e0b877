"""What runs an operator of ours on tensors of any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering import cpu
from memcompile.lowering._torch import on_the_cpu
from memcompile.lowering.register.schema import operator


def without_autocast(device: torch.device) -> torch.autocast:
    """Autocast off on `device`; the CPU's switch stands in for a device that knows no autocast (meta)."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if available else "cpu", enabled=False)


def anywhere(
    name: str,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    gpu_kernel: Callable[..., Callable[..., Any] | None],
) -> Callable[..., Any]:
    """The operator `name` on any device: the C++ of `lowering.cpu` on the CPU, where it can be built, the Triton of
    `lowering.triton` on a GPU, where it has a kernel, and else `kernel`, in operations of PyTorch. Autocast is off.

    Args:
        check: raises ValueError for arguments that the operator cannot serve.
        gpu_kernel: what runs the operator, by its name, with these arguments on a GPU; None where nothing does.
    """

    def run(*args: Any) -> Any:
        check(*args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        launch = gpu_kernel(name, *args)
        if launch is not None:
            with without_autocast(tensors[0].device), torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
                return launch(*args)
        if all(t.device.type == "cpu" and t.layout is torch.strided for t in tensors) and cpu.load():
            return on_the_cpu(operator(name), *args)  # from the next call on the dispatcher goes there by itself
        with without_autocast(tensors[0].device):
            return kernel(*args)

    return run
