"""The state of rows as operators take it: see `lowering.gather.table_gather`."""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime._torch import sized_at_run_time
from memcompile.runtime.table.rules import MOMENTS, State


class _Held:
    """The arguments of every table, as attributes. Dynamo takes the sizes of tensors that it reaches from a module for
    constants, and compiles anew when they change; from here it does not.
    """


_HELD = _Held()
_numbers = itertools.count()


class HeldRowState:
    """What operators take for one table."""

    def __init__(self, owner: Any) -> None:
        self.name = f"table_{next(_numbers)}"
        self.put(())
        weakref.finalize(owner, delattr, _HELD, self.name).atexit = False

    def put(self, arguments: Sequence[Tensor]) -> None:
        setattr(_HELD, self.name, arguments)

    def get(self) -> Sequence[Tensor]:
        return getattr(_HELD, self.name)  # type: ignore[no-any-return]


def row_state_arguments(
    state: State,
    dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    before: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """history, last_step, exp_avg and exp_avg_sq; empty where there is no such state, or not yet.

    Graphs that were compiled before the first step run after it, so nothing is assumed of how many rows there are. The
    tensors are views: what is set on them for that does not get into checkpoints.

    Args:
        state: of a table, of `dim` columns.
        device, dtype: of what is empty.
        before: what was returned last, to be returned again where it still holds.
    """
    found = [state.get(name) for name in ("history", "last_step", *MOMENTS)]
    if before and all(map(_same, found, before)):
        return before
    if before:
        device, dtype = before[2].device, before[2].dtype
    moment = torch.empty(0, dim, device=device, dtype=dtype)
    empty = (RateHistory.new(0).tensor, torch.empty(0, dtype=torch.int32, device=device), moment, moment.clone())
    return [sized_at_run_time(nothing if t is None else t.detach()) for t, nothing in zip(found, empty, strict=True)]


def _same(tensor: Tensor | None, shown: Tensor) -> bool:
    if tensor is None:
        return shown.shape[0] == 0
    return tensor.data_ptr() == shown.data_ptr() and tensor.shape == shown.shape and tensor.dtype is shown.dtype
