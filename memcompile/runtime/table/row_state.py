"""The state of rows as operators take it: see `lowering.gather.table_gather`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime._torch import sized_at_run_time
from memcompile.runtime.table.rules.rule import MOMENTS, State


def row_state_arguments(state: State | None, dim: int, before: Sequence[Tensor] = ()) -> Sequence[Tensor]:
    """history, last_step, exp_avg and exp_avg_sq; empty where there is no such state, or not yet.

    Graphs that were compiled before the first step run after it, so nothing is assumed of how many rows there are. The
    tensors are views: what is set on them for that does not get into checkpoints.

    Args:
        state: of a table, of `dim` columns.
        before: what was returned last, to be returned again where it still holds.
    """
    state = state or {}
    found = [state.get(name) for name in ("history", "last_step", *MOMENTS)]
    if before and all(map(_same, found, before)):
        return before
    empty = (RateHistory.new(0).tensor, torch.empty(0, dtype=torch.int32), torch.empty(0, dim), torch.empty(0, dim))
    return [sized_at_run_time(nothing if t is None else t.detach()) for t, nothing in zip(found, empty, strict=True)]


def _same(tensor: Tensor | None, shown: Tensor) -> bool:
    if tensor is None:
        return shown.shape[0] == 0
    return tensor.data_ptr() == shown.data_ptr() and tensor.shape == shown.shape and tensor.dtype is shown.dtype
