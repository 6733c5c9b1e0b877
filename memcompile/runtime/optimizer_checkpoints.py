"""Checkpoints of optimizers: the state of values that are stepped by rows is loaded in the dtype that it was saved in.

`Optimizer.load_state_dict` casts state to its parameter's dtype, which would round the fp32 moments of bf16 values.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from memcompile.runtime.optim.row_optimizer import loaded_states, placed
from memcompile.runtime.pool import live_pools
from memcompile.runtime.values_stepper import catch_up_values_of


def install_exact_loading() -> None:
    """Wraps `Optimizer.load_state_dict`, and `__getstate__`, by which optimizers are pickled and copied, for those that
    hold such values. Idempotent.
    """
    original, getstate = Optimizer.load_state_dict, Optimizer.__getstate__
    if hasattr(original, "_memcompile_exact"):
        return

    @functools.wraps(original)
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
        by_rows = {id(pool.values) for pool in live_pools() if pool.values_grad != "dense"}
        for parameter, saved in loaded_states(self, functools.partial(original, self), state_dict):
            for name, value in saved.items() if id(parameter) in by_rows else ():
                if isinstance(value, Tensor) and self.state[parameter][name].dtype != value.dtype:
                    self.state[parameter][name] = placed(name, value, parameter)

    @functools.wraps(getstate)
    def caught_up(self: Optimizer) -> dict[str, Any]:
        catch_up_values_of(self)
        return getstate(self)

    Optimizer.__getstate__ = caught_up  # type: ignore[method-assign]
    load_state_dict._memcompile_exact = True  # type: ignore[attr-defined]
    Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
