"""Checkpoints of optimizers: the state of values that are stepped by rows is loaded in the dtype that it was saved in.

`Optimizer.load_state_dict` casts state to its parameter's dtype, which would round the fp32 moments of bf16 values.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from memcompile.runtime.optim.row_optimizer import placed
from memcompile.runtime.pool import live_pools


def install_exact_loading() -> None:
    """Wraps `Optimizer.load_state_dict`, and `__getstate__`, by which optimizers are pickled and copied, for those that
    hold such values. Idempotent.
    """
    original, getstate = Optimizer.load_state_dict, Optimizer.__getstate__
    if hasattr(original, "_memcompile_exact"):
        return

    @functools.wraps(original)
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
        seen: list[dict[str, Any]] = []
        # The last of the hooks sees what the others made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
        try:
            original(self, state_dict)
        finally:
            handle.remove()
        _restore_dtypes(self, seen[0])

    @functools.wraps(getstate)
    def caught_up(self: Optimizer) -> dict[str, Any]:
        for pool in live_pools():
            if pool.stepper is not None and pool.stepper.optimizer is self:
                pool.catch_up()
        return getstate(self)

    Optimizer.__getstate__ = caught_up  # type: ignore[method-assign]
    load_state_dict._memcompile_exact = True  # type: ignore[attr-defined]
    Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _restore_dtypes(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    by_rows = {id(pool.values) for pool in live_pools() if pool.values_grad != "dense"}
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            if id(parameter) in by_rows:
                for name, value in saved["state"].get(number, {}).items():
                    if isinstance(value, Tensor) and optimizer.state[parameter][name].dtype != value.dtype:
                        optimizer.state[parameter][name] = placed(name, value, parameter)
