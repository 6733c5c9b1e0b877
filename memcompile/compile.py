"""The front door: `torch.compile(model, backend="memcompile", ...)` plans the model, then compiles it.

Importing memcompile wraps `torch.compile` once. Calls for another backend pass through untouched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memcompile._torch import inductor_options, list_backends, register_backend
from memcompile.backend import Backend
from memcompile.backend import memcompile as named_backend
from memcompile.config import OPTION_NAMES, check_names
from memcompile.errors import OptionError, PlanError
from memcompile.planning.plan import plan
from memcompile.runtime.pool import live_pools, pool_of
from memcompile.runtime.wrappers import unwrap

NAME = "memcompile"
_PLAN_KEYWORDS = ("memory", "example_inputs", "memory_mesh", "shard_by", "shard_tokens")
_OWN_KEYWORDS = (*OPTION_NAMES, *_PLAN_KEYWORDS)


def install_front_door() -> None:
    """Registers the backend's name and wraps ``torch.compile``. Idempotent."""
    if NAME not in list_backends(exclude_tags=()):
        register_backend(named_backend, name=NAME)
    if not isinstance(torch.compile, _Wrapped):
        torch.compile = _Wrapped(torch.compile)


class _Wrapped:
    """``torch.compile`` with one more backend. A class, so that no other wrapper's copied attributes pass for it."""

    def __init__(self, original: Callable) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self.keywords = frozenset(inspect.signature(original).parameters)

    def __call__(self, model: Any = None, **kwargs: Any) -> Any:
        if not _is_ours(kwargs.get("backend")):
            return self.original(model, **kwargs)
        if model is None:  # the decorator form; torch's own would come back here with our keywords gone
            return lambda decorated: self(decorated, **kwargs)
        ours, rest = _split(kwargs, self.keywords)
        backend = _plan(model, ours, fullgraph=bool(rest.get("fullgraph")))
        return self.original(model, **{**rest, "backend": backend})


def _is_ours(backend: Any) -> bool:
    return backend == NAME or backend is named_backend or isinstance(backend, Backend)


def _split(kwargs: dict[str, Any], torch_keywords: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options, given as keywords or inside ``options``, and what is left for ``torch.compile``."""
    options = dict(kwargs.get("options") or {})
    check_names({k: v for k, v in kwargs.items() if k not in torch_keywords}, also_known=_PLAN_KEYWORDS)
    ours = {k: v for k, v in kwargs.items() if k in _OWN_KEYWORDS}
    for name in [k for k in options if k in _OWN_KEYWORDS]:
        value = options.pop(name)
        if name in ours and ours[name] != value:
            raise OptionError(f"{name} is given twice: {ours[name]!r} as a keyword, {value!r} in options")
        ours[name] = value
    check_names({k.split(".")[0]: v for k, v in options.items()}, also_known=_inductor_names())
    rest = {k: v for k, v in kwargs.items() if k not in _OWN_KEYWORDS and k != "options"}
    return ours, rest | ({"options": options} if options else {})


@functools.lru_cache
def _inductor_names() -> tuple[str, ...]:
    return tuple({name.split(".")[0] for name in inductor_options()})


def _plan(model: Any, ours: dict[str, Any], fullgraph: bool) -> Backend:
    """Plans what is compiled and returns the backend for it."""
    if isinstance(model, nn.Module):
        module = model
    elif isinstance(getattr(model, "__self__", None), nn.Module):
        module = model.__self__  # model.forward, or the call that model.compile() hands to torch.compile
    else:
        return _function_backend(model, ours)
    plan(module, **ours)
    root, wrappers = unwrap(module)
    pool = pool_of(root)
    assert pool is not None
    pool.table.watch_gradient()  # of values that were cast or moved since
    is_forward = model is module or getattr(model, "__name__", "") in ("forward", "_call_impl")
    return Backend(pool, whole=fullgraph and is_forward and pool.owner in root.modules() and not wrappers)


def _function_backend(function: Any, ours: dict[str, Any]) -> Backend:
    name = getattr(function, "__name__", type(function).__name__)
    if ours:
        raise OptionError(
            f"{', '.join(sorted(ours))} given for {name!r}, which is no nn.Module: plan the model that it calls, "
            f"memcompile.plan(model, ...), then compile the function without memory options"
        )
    if not any(True for _ in live_pools()):
        raise PlanError(
            f"{name!r} is no nn.Module, and no model has a memory yet: call memcompile.plan(model, memory_layers=...) "
            f"on the model that it calls, then compile it"
        )
    for pool in live_pools():
        pool.table.watch_gradient()  # of values that were cast or moved since
    return Backend(None, whole=False)
