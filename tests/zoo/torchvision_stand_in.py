"""timm without torchvision, which it imports at the top of its modules and its models do not need.

PyPI's torchvision is linked against the CUDA build of torch and does not import beside the CPU build; installed, it
breaks transformers too. So `make test` installs timm alone, and these modules stand in while timm is imported.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MODULES = (
    "torchvision torchvision.datasets torchvision.models torchvision.models.feature_extraction torchvision.ops "
    "torchvision.ops.misc torchvision.transforms torchvision.transforms.functional"
).split()


class _AnyName(type):
    """Has every attribute, so that tables such as ``{InterpolationMode.NEAREST: "nearest"}`` can be built."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _StandIn(ModuleType):
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


@contextlib.contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """Inside, ``import torchvision`` works; outside, nothing is left of it. A torchvision that is there is used."""
    if find_spec("torchvision") is not None:
        yield
        return
    for name in _MODULES:
        sys.modules[name] = _StandIn(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in _MODULES:
            del sys.modules[name]
