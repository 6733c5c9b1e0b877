"""What a process has of PyTorch: every attribute of its modules and classes, its dispatcher, its global hooks."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import torch

CONTAINERS = {dict: dict, OrderedDict: dict, list: list, set: set}


def torch_state() -> dict[str, Any]:
    """Each attribute of each module of PyTorch that is imported, and of its classes, by name. Of a container that is an
    attribute, such as those of global hooks, what is in it.
    """
    state: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] != "torch":
            continue
        for name, value in list(vars(module).items()):
            state[f"{module_name}.{name}"] = _shallow(value)
            if isinstance(value, type) and str(value.__module__).partition(".")[0] == "torch":
                members = list(vars(value).items())
                state |= {f"{value.__module__}.{value.__qualname__}.{member}": _shallow(v) for member, v in members}
    return state


def dispatcher() -> dict[str, str]:
    """What is registered for each operator of PyTorch's own."""
    names = torch._C._dispatch_get_all_op_names()
    return {name: torch._C._dispatch_dump(name) for name in names if not name.startswith("memcompile::")}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names of what is no longer the same object, or holds others."""
    return {name for name, value in before.items() if name not in after or not _same(value, after[name])}


def _shallow(value: Any) -> Any:
    return CONTAINERS[type(value)](value) if type(value) in CONTAINERS else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str):
        return one == other
    if type(one) is not type(other) or type(one) not in CONTAINERS:
        return one is other
    if type(one) is dict:
        return [(id(k), id(v)) for k, v in one.items()] == [(id(k), id(v)) for k, v in other.items()]
    return sorted(map(id, one)) == sorted(map(id, other))
