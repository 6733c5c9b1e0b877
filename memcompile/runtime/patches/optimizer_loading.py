"""`Optimizer.load_state_dict` and `Optimizer.__getstate__`: states go to the parameters of their names; that of a
memory's values is loaded in the dtype that it was saved in, and pickled and copied up to date.

No public way: loading casts state to its parameter's dtype before a hook sees it, which would round the fp32 moments
of bf16 values; pickling has no hook.
Until: https://github.com/pytorch/pytorch/issues/43706 (state keeps its dtype).
The same: optimizers that hold no parameters of a memory.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from memcompile.common.patch import Patch, Replaced
from memcompile.runtime.optimizer_state import load_exactly
from memcompile.runtime.table.hooks import flush_tables_of, meet
from memcompile.runtime.table.named_states import matched, memories_in
from memcompile.runtime.table.table import tables_in


def _exact(load: Callable[..., None], optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    held = {id(table.values) for table, _ in tables_in(optimizer)}
    if not held:
        load(optimizer, matched(optimizer, state_dict) if memories_in(optimizer) else state_dict)
        return
    meet(optimizer)
    load_own = functools.partial(load, optimizer)
    load_exactly(optimizer, load_own, matched(optimizer, state_dict), lambda parameter: id(parameter) in held)


def _flushed(getstate: Callable[..., dict[str, Any]], optimizer: Optimizer) -> dict[str, Any]:
    flush_tables_of(optimizer)
    return getstate(optimizer)


PATCH = Patch(Replaced(Optimizer, "load_state_dict", _exact), Replaced(Optimizer, "__getstate__", _flushed))
