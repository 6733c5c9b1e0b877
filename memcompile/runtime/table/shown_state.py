"""The state of a table's rows in the optimizer that holds its values, where checkpoints and people look for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memcompile.errors import OptionError
from memcompile.runtime._torch import local_part, whole_like
from memcompile.runtime.table.rules import Rule, State

if TYPE_CHECKING:
    from memcompile.runtime.table.table import ValueTable

_MISSED = ("last_step", "history")  # not shown: rows are flushed before an optimizer is saved


class ShownState:
    """What a table has put into `optimizer.state[values]`: its own tensors, in the layout of PyTorch's optimizer of the
    same mathematics, so that dense training goes on by rows, and back.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}

    def is_in(self, optimizer: Optimizer, values: Tensor, state: State | None) -> bool:
        """Whether the optimizer has it as it was put there: nothing was loaded, reset or replaced since."""
        given = optimizer.state.get(values)
        if not given or state is None or not self._entries:
            return False
        same = all(given.get(name) is value for name, value in self._entries.items())
        return same and int(given["step"]) == state["step"]

    def show(self, optimizer: Optimizer, table: ValueTable, state: State) -> None:
        """Puts it there: DTensors where the values are one, and the number of steps as PyTorch has it."""
        entries = {name: value for name, value in state.items() if name not in (*_MISSED, "step")}
        if isinstance(table.values, DTensor):
            entries = {name: whole_like(table.values, value) for name, value in entries.items()}
        self._entries = entries
        self._entries["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu")
        shown = optimizer.state.setdefault(table.values, {})
        for name in _MISSED:
            shown.pop(name, None)  # of an optimizer for rows, which loads the state that it would have on its own
        shown.update(self._entries)

    def taken_over(self, optimizer: Optimizer, table: ValueTable, rule: type[Rule]) -> State | None:
        """The state to go on from that the optimizer has for the values; None where it has none that the rule knows.

        Raises:
            OptionError: it is of the whole table, of which this rank has a part.
        """
        self._entries = {}
        given = optimizer.state.get(table.values) or {}
        if not given or not rule.saved <= given.keys():
            return None
        state = {name: local_part(given[name]) for name in (*rule.saved, "master") if name in given}
        for name, value in state.items():
            if table.sharded is not None and value.dim() > 1 and value.shape != table.part.shape:
                raise OptionError(
                    f"the optimizer's state of the memory's values, {name} {list(value.shape)}, is not that of this "
                    f"rank's part, {list(table.part.shape)}: load trainings that were sharded otherwise, or not at "
                    f"all, by memcompile.checkpoint"
                )
        return {**state, "step": int(given.get("step", 0))}
