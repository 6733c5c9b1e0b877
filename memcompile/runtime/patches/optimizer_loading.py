"""`Optimizer.load_state_dict` and `Optimizer.__getstate__`: the state of a memory's values is loaded in the dtype that
it was saved in, and pickled and copied up to date.

No public way: loading casts state to its parameter's dtype before a hook sees it, which would round the fp32 moments
of bf16 values; pickling has no hook.
Until: https://github.com/pytorch/pytorch/issues/43706 (state keeps its dtype).
The same: optimizers that hold no values of a memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from memcompile.runtime.patches.patch import Patch, Replaced
from memcompile.runtime.table.hooks import flush_tables_of
from memcompile.runtime.table.loading import load_state


def _exact(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
        load_state(self, functools.partial(original, self), state_dict)

    return load_state_dict


def _flushed(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def getstate(self: Optimizer) -> dict[str, Any]:
        flush_tables_of(self)
        return original(self)

    return getstate


PATCH = Patch(Replaced(Optimizer, "load_state_dict", _exact), Replaced(Optimizer, "__getstate__", _flushed))
