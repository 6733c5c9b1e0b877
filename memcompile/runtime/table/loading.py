"""What loading the state of an optimizer that holds a table comes to: `runtime.patches.optimizer_loading` calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from memcompile.runtime.optimizer_state import load_exactly
from memcompile.runtime.table.hooks import meet
from memcompile.runtime.table.live_tables import tables_in
from memcompile.runtime.table.named_states import matched


def load_state(optimizer: Optimizer, load: Callable[[dict[str, Any]], object], state_dict: dict[str, Any]) -> None:
    """Loads by `load(state_dict)`: states go to the parameters of their names, and those of tables keep their dtypes.

    Raises:
        PlanError: the states are of other parameters; nothing is loaded then.
    """
    held = {id(table.values) for table, _ in tables_in(optimizer)}
    if not held:
        load(state_dict)
        return
    meet(optimizer)
    load_exactly(optimizer, load, matched(optimizer, state_dict), lambda parameter: id(parameter) in held)
