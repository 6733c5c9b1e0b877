"""What runs an operator: PyTorch's dispatcher takes the kernel of the tensors' device, or else one that is made of
operations of PyTorch. A device's kernels take long to load, so they are loaded when an operator is first called there.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import unregister
from memcompile.lowering.register.schema import NAMESPACE, operator


@dataclass(frozen=True)
class InPyTorch:
    """An operator in operations of PyTorch, for the devices, and the arguments, that no other kernel takes: its `check`
    and `kernel` as `register_operator` has them. The kernel may assume that autocast is off.
    """

    check: Callable[..., None]
    kernel: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        self.check(*args)
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with without_autocast(device):
            return self.kernel(*args)


IN_PYTORCH: dict[str, InPyTorch] = {}  # by name: every operator that a device may have a kernel for


def without_autocast(device: torch.device) -> torch.autocast:
    """Autocast off on `device`; the CPU's switch stands in for a device that knows no autocast (meta)."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if available else "cpu", enabled=False)


class LateKernels:
    """The kernels of one device, loaded by calling this, or by the first call of an operator on that device.

    Until then each operator has a kernel there that loads all of them and calls the operator again. Then the dispatcher
    finds the device's own kernels; where they cannot be loaded it finds those in operations of PyTorch.

    Args:
        key: the device's dispatch key, "CPU" or "CUDA".
        load: registers the kernels, and returns whether they are there.
    """

    def __init__(self, key: str, load: Callable[[], bool]) -> None:
        self._key, self._load = key, load
        self._names: tuple[str, ...] = ()
        self._first_calls: torch.library.Library | None = None
        self._loaded: bool | None = None
        self._lock = threading.Lock()

    def __call__(self) -> bool:
        """Loads the kernels, once. Returns whether they are there."""
        if self._loaded is not None:
            return self._loaded
        with self._lock:
            if self._loaded is None:
                if self._first_calls is not None:
                    unregister(self._first_calls)  # PyTorch warns of a kernel that takes another's place
                try:
                    self._loaded = self._load()
                except BaseException:  # an interrupted build: the next call tries again
                    self.load_at_first_call(self._names)
                    raise
            return self._loaded

    def load_at_first_call(self, names: Iterable[str]) -> None:
        """Has the first call of any of these operators on the device load the kernels."""
        self._names = tuple(names)
        self._first_calls = torch.library.Library(NAMESPACE, "IMPL")  # type: ignore[no-untyped-call]
        for name in self._names:
            self._first_calls.impl(name, functools.partial(self._first_call, name), self._key)  # type: ignore[no-untyped-call]

    def _first_call(self, name: str, *args: Any) -> Any:
        self()
        return operator(name)(*args)
