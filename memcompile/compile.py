"""The front door: `torch.compile(model, backend="memcompile", ...)` plans the model, then compiles it.

Importing memcompile wraps `torch.compile` once. Calls for another backend pass through untouched. What a call for this
one needs is imported by that call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memcompile.config import OPTION_NAMES, check_names
from memcompile.errors import OptionError, PlanError

if TYPE_CHECKING:
    from memcompile.backend import Backend

NAME = "memcompile"
_PLAN_KEYWORDS = ("memory", "example_inputs", "memory_mesh", "shard_by", "shard_tokens")
_OWN_KEYWORDS = (*OPTION_NAMES, *_PLAN_KEYWORDS)


def install_front_door() -> None:
    """Wraps ``torch.compile``. Idempotent."""
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
        backend = _planned(model, ours, fullgraph=bool(rest.get("fullgraph")))
        return self.original(model, **{**rest, "backend": backend})


def _is_ours(backend: Any) -> bool:
    if isinstance(backend, str):
        return backend == NAME
    module = sys.modules.get("memcompile.backend")  # nothing of a module that is not imported can be given
    return module is not None and (backend is module.memcompile or isinstance(backend, module.Backend))


def _split(kwargs: dict[str, Any], torch_keywords: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options, given as keywords or inside ``options``, and what is left for ``torch.compile``."""
    from memcompile._torch import inductor_options

    options = dict(kwargs.get("options") or {})
    check_names({k: v for k, v in kwargs.items() if k not in torch_keywords}, also_known=_PLAN_KEYWORDS)
    ours = {k: v for k, v in kwargs.items() if k in _OWN_KEYWORDS}
    for name in [k for k in options if k in _OWN_KEYWORDS]:
        value = options.pop(name)
        if name in ours and ours[name] != value:
            raise OptionError(f"{name} is given twice: {ours[name]!r} as a keyword, {value!r} in options")
        ours[name] = value
    check_names({k.split(".")[0]: v for k, v in options.items()}, also_known=inductor_options())
    rest = {k: v for k, v in kwargs.items() if k not in _OWN_KEYWORDS and k != "options"}
    return ours, rest | ({"options": options} if options else {})


def _planned(model: Any, ours: dict[str, Any], fullgraph: bool) -> Backend:
    """The backend for what is compiled: a model, planned with our options, or a function that calls planned models."""
    from memcompile.backend import Backend
    from memcompile.planning.plan import plan
    from memcompile.runtime.pool import live_pools, pool_of
    from memcompile.runtime.wrappers import unwrap

    # The owner of model.forward, or of the call that model.compile() hands to torch.compile
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(module, nn.Module):
        plan(module, **ours)
        root, wrappers = unwrap(module)
        pool = pool_of(root)
        assert pool is not None
        pool.table.watch_gradient()  # of values that were cast or moved since
        is_forward = model is module or getattr(model, "__name__", "") in ("forward", "_call_impl")
        return Backend(pool, whole=fullgraph and is_forward and pool.owner in root.modules() and not wrappers)
    name = getattr(model, "__name__", type(model).__name__)
    if ours:
        raise OptionError(
            f"{', '.join(sorted(ours))} given for {name!r}, which is no nn.Module: plan the model that it calls, "
            f"memcompile.plan(model, ...), then compile the function without memory options"
        )
    pools = list(live_pools())
    if not pools:
        raise PlanError(
            f"{name!r} is no nn.Module, and no model has a memory yet: call memcompile.plan(model, memory_layers=...) "
            f"on the model that it calls, then compile it"
        )
    for pool in pools:
        pool.table.watch_gradient()
    return Backend(None, whole=False)
