"""The proof that two modules do the same: then one trace is a trace of both."""

from __future__ import annotations

import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.passes.capture.state import HOOKS

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules", *HOOKS})


def structure(module: nn.Module, seen: dict[int, int] | None = None) -> Hashable:
    """A value that is equal for two modules only if their forwards do the same: the same classes and attributes, and
    tensors of the same shapes, dtypes and ties (to what is ``seen``). What cannot be compared is taken for different,
    unless it is one object. The user's hooks do not count: tracing silences them.
    """
    seen = {} if seen is None else seen
    if id(module) in seen:
        return ("again", seen[id(module)])
    seen[id(module)] = len(seen)
    attributes = {name: value for name, value in module.__dict__.items() if name not in _REGISTERED}
    tensors = {**module._parameters, **module._buffers}
    return (
        type(module),
        tuple((name, _frozen(value, module)) for name, value in sorted(attributes.items())),
        tuple((name, None if t is None else _tensor(t, seen)) for name, t in tensors.items()),
        tuple((name, None if m is None else structure(m, seen)) for name, m in module._modules.items()),
    )


def _tensor(tensor: Tensor, seen: dict[int, int]) -> Hashable:
    tie = seen.setdefault(id(tensor), len(seen))
    return (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, tie)


def _frozen(value: Any, owner: nn.Module) -> Hashable:
    if isinstance(value, (list, tuple)):
        return (type(value), *(_frozen(item, owner) for item in value))
    if isinstance(value, dict):
        return (type(value), *((key, _frozen(item, owner)) for key, item in value.items()))
    if isinstance(value, types.MethodType) and value.__self__ is owner:
        return value.__func__
    if isinstance(value, (set, frozenset)) and all(isinstance(item, _PLAIN) for item in value):
        return (type(value), frozenset(value))
    if isinstance(value, (*_PLAIN, *_FUNCTIONS)):
        return (type(value), value)
    return (type(value), id(value))
