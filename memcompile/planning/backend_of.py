"""The backend for what `torch.compile` is given: a model, which is planned, or a function that calls planned ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from memcompile.backend import Backend
from memcompile.errors import OptionError, PlanError
from memcompile.planning.plan import plan
from memcompile.runtime.pool import live_pools, pool_of
from memcompile.runtime.wrappers import unwrap


def backend_of(model: Any, ours: dict[str, Any], fullgraph: bool) -> Backend:
    """Plans what is compiled, with our options, and returns the backend for it."""
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
