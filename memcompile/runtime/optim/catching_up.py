"""Optimizers whose rows fall behind between two touches, and how they are asked to catch up."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from memcompile.lowering.register.schema import operator
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime.optim.row_optimizer import Group, RowOptimizer, State

_HITS_A_ROW = 4  # from which a copy of a table is cheaper than to correct each hit
_ROWS = 2**16  # that are caught up at once: so many plans there may be


class CatchingUpOptimizer(RowOptimizer):
    """An optimizer that keeps, in a parameter's state, `last_step` int32 [slots] and a `RateHistory`.

    The history has one entry for each change of the rates, and at most max(1024, slots) of them: with more, all rows
    are caught up and it starts again, which costs one row a step on average.
    """

    factors: int  # of the history

    @torch.no_grad()
    def catch_up(self, parameter: Tensor, rows: Tensor | None = None, tell_autograd: bool = True) -> None:
        """Does what rows have missed, so that their values are those of the dense optimizer after the steps so far.

        Args:
            parameter: one of this optimizer's.
            rows: int32 or int64, of any shape, repeats allowed: the rows that are about to be read. None is all.
            tell_autograd: that the parameter has changed, which is an error in a backward that read it before. Not
                where all who read it do so by `current_gather` and `current_dot`, which have seen it as it is now.

        Raises:
            ValueError: the parameter is not in this optimizer.
            IndexError: a row is not in the table.
        """
        group = self._group_of(parameter)
        state = self.state.get(parameter)
        if not state or "last_step" not in state:
            return  # nothing was missed
        last = state["last_step"]
        if rows is None:
            behind = (last != state["step"]).nonzero()[:, 0]
        else:
            asked = _distinct(rows.detach().to(last.device), len(last))
            behind = asked[last[asked] != state["step"]]
        # Rows of a dtype that is not stepped, as after model.half(), catch up in fp32.
        table = parameter.detach().float() if parameter.dtype is torch.float16 else parameter
        for part in torch.split(behind, _ROWS):
            self._catch_up_rows(table, state, group, part)
        if table is not parameter:
            parameter.detach().copy_(table)
        if len(behind) and tell_autograd:
            increment_version(parameter)
        if rows is None:
            self._history(state).forget()

    @torch.no_grad()
    def current_gather(self, parameter: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        if self._is_small(parameter, slots):
            return super().current_gather(self._current_table(parameter), slots, weights)
        state, last = self._last_steps(parameter, slots)
        if last is None:
            return super().current_gather(parameter, slots, weights)
        return self._gather_behind(parameter, state, slots, weights, last)

    @torch.no_grad()
    def current_dot(self, parameter: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
        if self._is_small(parameter, slots):
            return super().current_dot(self._current_table(parameter), slots, grad)
        state, last = self._last_steps(parameter, slots)
        if last is None:
            return super().current_dot(parameter, slots, grad)
        return self._dot_behind(parameter, state, slots, grad, last)

    @staticmethod
    def _is_small(parameter: Tensor, slots: Tensor) -> bool:
        """Whether a table is so small that its rows are hit several times each: then a copy is read that is up to date.
        None of bf16, which would be rounded on the way.
        """
        return slots.numel() >= _HITS_A_ROW * parameter.shape[0] and parameter.dtype is not torch.bfloat16

    def _current_table(self, parameter: Tensor) -> Tensor:
        """The table as it is by now: itself where no row is behind, else a copy."""
        state: State = self.state.get(parameter) or {}
        if "last_step" not in state:
            return parameter
        rows = (state["last_step"] != state["step"]).nonzero()[:, 0]
        if len(rows) == 0:
            return parameter
        some = {name: state[name][rows] for name in {"last_step", *self.saved}}
        current = parameter.detach()[rows]
        own = torch.arange(len(rows), device=parameter.device)
        self._catch_up_rows(current, {**state, **some}, self._group_of(parameter), own)
        return parameter.detach().index_copy(0, rows, current)

    def _last_steps(self, parameter: Tensor, slots: Tensor) -> tuple[State, Tensor | None]:
        """The state, and int32 [tokens, hits] the steps that the rows of these slots were last in; None where none of
        them is behind.
        """
        state: State = self.state.get(parameter) or {}
        if "last_step" not in state:
            return state, None
        last = state["last_step"].index_select(0, slots.reshape(-1)).view(slots.shape)
        return state, last if bool((last != state["step"]).any()) else None

    @abstractmethod
    def _gather_behind(self, parameter: Tensor, state: State, slots: Tensor, weights: Tensor, last: Tensor) -> Tensor:
        """`current_gather` where rows are behind, whose `last` steps [tokens, hits] are known."""

    @abstractmethod
    def _dot_behind(self, parameter: Tensor, state: State, slots: Tensor, grad: Tensor, last: Tensor) -> Tensor:
        """`current_dot` in the same way."""

    @abstractmethod
    def _catch_up_rows(self, parameter: Tensor, state: State, group: Group, rows: Tensor) -> None:
        """Catches distinct rows int64 [n], all of them behind, up with the last step."""

    def _history(self, state: State) -> RateHistory:
        return RateHistory(state, self.factors)

    def _bound_history(self, parameter: Tensor, state: State) -> None:
        if len(self._history(state)) > max(1024, parameter.shape[0]):
            self.catch_up(parameter)


def _distinct(rows: Tensor, slots: int) -> Tensor:
    """The distinct ones, int64 [n]; raises IndexError where one is not in a table of `slots` rows."""
    if rows.numel() == 0:
        return rows.new_empty(0, dtype=torch.int64)
    lowest, highest = (int(row) for row in torch.aminmax(rows))
    if lowest < 0 or highest >= slots:
        raise IndexError(f"catch_up: rows {lowest} to {highest} of a table of {slots}")
    distinct: Tensor = operator("hits_by_row")(rows.reshape(1, -1), slots)[0]
    return distinct
