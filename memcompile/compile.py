"""The front door: `torch.compile(model, backend="memcompile", ...)` plans the model, then compiles it.

Importing memcompile wraps `torch.compile` once. Calls for another backend pass through untouched. What a call for this
one needs is imported by that call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from memcompile.config import OPTION_NAMES, check_names
from memcompile.errors import OptionError

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
        from memcompile.planning.backend_of import backend_of

        backend = backend_of(model, ours, fullgraph=bool(rest.get("fullgraph")))
        return self.original(model, **{**rest, "backend": backend})


def _is_ours(backend: Any) -> bool:
    if isinstance(backend, str):
        return backend == NAME
    module = sys.modules.get("memcompile.backend")  # nothing of a module that is not imported can be given
    return module is not None and (backend is module.memcompile or isinstance(backend, module.Backend))


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
    from memcompile._torch import inductor_options

    return tuple({name.split(".")[0] for name in inductor_options()})
