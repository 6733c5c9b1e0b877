"""Around the step of an optimizer that holds a table: the table steps its rows, and the optimizer does not see them.

PyTorch's optimizers, and those that follow them, skip a parameter without a gradient. So the last hook before a step
steps the rows, and takes the gradient of the values aside; a hook after the step puts it back. The groups and the state
of the optimizer stay as they are. Where a closure makes the gradients inside of the step, it runs with all gradients in
place, and the rows are stepped after the step.

One hook of every optimizer of the process finds those that hold a table. It is there while there are tables.
"""

import dataclasses
import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from memcompile.errors import OptionError
from memcompile.runtime.optimizer_state import parameters_of
from memcompile.runtime.storage.frozen_values import refuse_gradient
from memcompile.runtime.table.named_states import save_names
from memcompile.runtime.table.row_gradient import now
from memcompile.runtime.table.table import ValueTable, live_tables, tables_in
from memcompile.runtime.table.untrained import tell_in_step
from memcompile.runtime.table.which_rule import rule_in

_everywhere: list[RemovableHandle] = []  # the hook of every optimizer, while there are tables


@dataclasses.dataclass
class _Hooked:
    """An optimizer that holds tables.

    Attributes:
        before: the hook before its step.
        aside: the tables whose gradients are aside, with these.
        witness: a parameter that kept its gradient, and that gradient: whether gradients were dropped since.
        after_closure: whether rows are to be stepped after the step.
    """

    before: RemovableHandle
    aside: list[tuple[ValueTable, Tensor]] = dataclasses.field(default_factory=list)
    witness: tuple[Tensor, Tensor] | None = None
    after_closure: bool = False


_hooked: weakref.WeakKeyDictionary[Optimizer, _Hooked] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those without tables


def watch_optimizers(table: ValueTable) -> None:
    """From here on the table is stepped with whatever optimizer holds its values."""
    live_tables.add(table)
    if not _everywhere:
        _everywhere.append(register_optimizer_step_pre_hook(_before_any_step))
    weakref.finalize(table, _stop_without_tables).atexit = False


def _stop_without_tables() -> None:
    if not any(True for _ in live_tables):
        while _everywhere:
            _everywhere.pop().remove()


def meet(optimizer: Optimizer) -> _Hooked:
    """Gives an optimizer that holds tables its hooks. Those that the user registered before a step run before ours."""
    hooked = _hooked.get(optimizer)
    if hooked is None:
        hooked = _hooked[optimizer] = _Hooked(optimizer.register_step_pre_hook(_before_step))
        optimizer.register_step_post_hook(_after_step)
        optimizer.register_state_dict_pre_hook(flush_tables_of)
        save_names(optimizer)
    else:
        hooked.before.remove()
        hooked.before = optimizer.register_step_pre_hook(_before_step)
    return hooked


def flush_tables_of(optimizer: Optimizer) -> None:
    """The optimizer is about to be saved, which does not save what rows have missed."""
    for table, _ in tables_in(optimizer):
        table.flush()


@torch.compiler.disable  # where a step is compiled: what hooks do is not for graphs
def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _steps_others(optimizer):
        if tables_in(optimizer):
            meet(optimizer)
        elif optimizer not in _seen:
            _seen.add(optimizer)
            save_names(optimizer)
    tell_in_step(optimizer)


def _steps_others(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps others inside its own step, which then step the tables that they hold."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer) and value is not optimizer]
    on_one_rank = bool(inner) and type(optimizer).__name__ == "ZeroRedundancyOptimizer"
    if on_one_rank and any(table.gradient != "dense" for table, _ in tables_in(optimizer)):
        raise OptionError(
            "ZeroRedundancyOptimizer keeps the state of each parameter on one rank, and the values' rows are stepped "
            "on all: plan with values_grad='dense'"
        )
    return bool(inner)


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    hooked = _hooked[optimizer]
    _drop_cleared(hooked)
    if hooked.after_closure:
        _put_back(hooked)  # no row was stepped yet
    for table, _ in tables_in(optimizer):
        if table.config.frozen:
            refuse_gradient(table.values)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    hooked.after_closure = callable(closure)
    if not callable(closure):
        _step_tables(optimizer)
        _take_aside(optimizer, hooked)
        return None
    _take_aside(optimizer, hooked)

    @functools.wraps(closure)
    def with_gradients() -> Any:
        _put_back(hooked)
        result = closure()  # where it raises, so does the step: the gradients stay in place
        _take_aside(optimizer, hooked)
        return result

    if len(args) > 1:
        return (args[0], with_gradients, *args[2:]), kwargs
    return args, {**kwargs, "closure": with_gradients}


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    hooked = _hooked[optimizer]
    _refuse_filled(optimizer, hooked)
    _drop_cleared(hooked)  # by a hook of the user's that ran first
    _put_back(hooked)
    if hooked.after_closure:
        hooked.after_closure = False
        _step_tables(optimizer)


def _refuse_filled(optimizer: Optimizer, hooked: _Hooked) -> None:
    """Raises where the optimizer gave the table a gradient of zeros, as some do with parameters that have none, and so
    stepped it by its own rule: once more, or by momentum alone.
    """
    for table, grad in hooked.aside:
        filled = table.values.grad
        if filled is not None and filled is not grad and not filled.is_sparse and not filled.any():
            table.values.grad = grad
            name = type(optimizer).__name__
            raise OptionError(
                f"{name} gives parameters without a gradient one of zeros, and steps the table of the memory by that. "
                f"This step has moved it: start anew. Build {name} after the plan, of the parameters p for which "
                f"memcompile.is_table(p) is false, and give the table to another optimizer, as torch.optim.AdamW"
            )


def _step_tables(optimizer: Optimizer) -> None:
    found = [(table, group) for table, group in tables_in(optimizer) if table.grad is not None]
    steps = [(table, *rule_in(optimizer, group, table.config)) for table, group in found]  # raises before rows move
    for table, rule, options in steps:
        table.step(optimizer, rule, options)


def _take_aside(optimizer: Optimizer, hooked: _Hooked) -> None:
    for table, _ in tables_in(optimizer):
        if table.values.grad is not None:
            hooked.aside.append((table, table.values.grad))
            table.values.grad = None
    hooked.witness = next(((p, p.grad) for p in parameters_of(optimizer) if p.grad is not None), None)


def _put_back(hooked: _Hooked) -> None:
    for table, grad in hooked.aside:
        table.values.grad = now(grad)
    hooked.aside, hooked.witness = [], None


def _drop_cleared(hooked: _Hooked) -> None:
    """Forgets gradients that are aside still and were cleared since, by `zero_grad()` for one, or made anew.

    They are aside where a step raised, and inside a step: that of a subclass, which calls its parent's, has hooks of
    its own. Their rows are not stepped again, and they are put back after the step.
    """
    if hooked.witness is not None and hooked.witness[0].grad is not hooked.witness[1]:
        hooked.aside = []
    hooked.aside = [(table, grad) for table, grad in hooked.aside if table.values.grad is None]
