"""A step of an optimizer that holds a table: the table steps its rows, and the optimizer does not see them.

A table is stepped as the last parameter of its optimizer. PyTorch's optimizers, and those that follow them, skip a
parameter without a gradient. So the gradient of the values is aside while the step of the optimizer's class runs. Then
it is put back, and the table steps its rows. Groups and state stay as they are. Hooks of the user run before and after
this, as do a class that calls the step of its parent, an optimizer that steps others, and closures: they see gradients,
groups and state as with any parameter.

Where a step raises, the gradient is in place again:
- Before the class's step, by an option that rows are not stepped with, for one, nothing has moved.
- Inside of it, no row has moved. The others may have, as in every optimizer. The step may be tried again, or dropped.
- While rows step, the others have moved. The step of rows is counted once they have moved, and not before.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memcompile.errors import OptionError
from memcompile.runtime._torch import has_state_dict_hooks
from memcompile.runtime.optimizer_state import optimizers_inside, parameters_of
from memcompile.runtime.storage.frozen_values import refuse_gradient
from memcompile.runtime.table.named_states import save_names
from memcompile.runtime.table.row_gradient import now
from memcompile.runtime.table.rules import Options, Rule
from memcompile.runtime.table.table import ValueTable, live_tables, tables_in
from memcompile.runtime.table.warnings.untrained import tell_in_step
from memcompile.runtime.table.which_rule import rule_in

_met: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those with tables
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those without tables
_aside: weakref.WeakKeyDictionary[ValueTable, "_Step"] = weakref.WeakKeyDictionary()  # who has its gradient aside


def watch_optimizers(table: ValueTable) -> None:
    """From here on the table is stepped with whatever optimizer holds its values."""
    live_tables.add(table)


def holds_tables(optimizer: Optimizer) -> bool:
    """Whether an optimizer that is about to step holds tables. Parameters of a memory that none holds are told."""
    held = bool(tables_in(optimizer))
    if held:
        meet(optimizer)
    elif optimizer not in _seen:
        _seen.add(optimizer)
        save_names(optimizer)
    tell_in_step(optimizer)
    return held


def meet(optimizer: Optimizer) -> None:
    """Has the state dicts of an optimizer that holds tables made when rows are up to date, with names. Idempotent."""
    if optimizer not in _met:
        _met.add(optimizer)
        if has_state_dict_hooks(optimizer):
            optimizer.register_state_dict_pre_hook(flush_tables_of)
            save_names(optimizer)


def flush_tables_of(optimizer: Optimizer) -> None:
    """The optimizer is about to be saved, which does not save what rows have missed."""
    for table, _ in tables_in(optimizer):
        table.flush()


def _tables_of_its_own(optimizer: Optimizer) -> list[tuple[ValueTable, Options]]:
    """The tables that an optimizer steps, each with its group: not those that it leaves to optimizers inside of it.

    Raises:
        OptionError: ranks share the work otherwise.
    """
    held = tables_in(optimizer)
    inner = list(optimizers_inside(optimizer)) if held else []
    if inner and type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        if any(table.gradient != "dense" for table, _ in held):
            raise OptionError(
                "ZeroRedundancyOptimizer keeps the state of each parameter on one rank, and the values' rows are "
                "stepped on all: plan with values_grad='dense'"
            )
        return []
    theirs = {table for other in inner for table, _ in tables_in(other)}
    return [(table, group) for table, group in held if table not in theirs]


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]  # where a step is compiled, that of the class is
def step_with_tables(body: Callable[..., Any], optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs the step of an optimizer, and that of the tables which it holds.

    Args:
        body: the step as the optimizer's class defines it.
        args, kwargs: of the step.
    """
    step = _begin(body, optimizer, args, kwargs)
    if step is None:
        return body(optimizer, *args, **kwargs)
    try:
        try:
            step.take_aside()
            result = body(optimizer, *step.args, **step.kwargs)
            step.refuse_filled()
        finally:
            step.put_back()
    finally:
        step.put_back()  # again, where an interrupt came between the lines of the first
    step.step_rows()
    return result


@torch.compiler.disable
def _begin(body: Callable[..., Any], optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> "_Step | None":
    """The step to run, before anything has moved; None where the optimizer has no tables to step, or where this is
    inside of a step of the same optimizer.
    """
    held = _tables_of_its_own(optimizer) if isinstance(optimizer, Optimizer) and optimizer in _met else []
    if not held or any(getattr(_aside.get(table), "optimizer", None) is optimizer for table, _ in held):
        return None
    return _Step(body, optimizer, held, args, kwargs)


class _Step:
    """A step that is running.

    Args:
        body: the step of the optimizer's class.
        held: the tables that it steps, with their groups.
        args, kwargs: of the step.

    Attributes:
        args, kwargs: the same, with a closure that runs while gradients are in place.
        rules: how each table that may have a gradient is stepped.
        gradients: those that are aside, or were when the step of the class ended.

    Raises:
        OptionError: an option of a group is not served.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        optimizer: Optimizer,
        held: list[tuple[ValueTable, Options]],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> None:
        self.optimizer, self.args, self.kwargs = optimizer, args, kwargs
        self.rules: dict[ValueTable, tuple[type[Rule], Options]] = {}
        self.gradients: dict[ValueTable, Tensor] = {}
        self._other: tuple[Tensor, Tensor, int] | None = None  # another parameter, its gradient, and that one's version
        closure = args[0] if args else kwargs.get("closure")
        if callable(closure) and args:
            self.args = (self._around(closure), *args[1:])
        elif callable(closure):
            self.kwargs = {**kwargs, "closure": self._around(closure)}
        for table, group in held:
            if table in _aside:
                _aside[table].leave(table)
            if table.config.frozen:
                refuse_gradient(table.values)
            if callable(closure) or table.values.grad is not None:
                self.rules[table] = rule_in(optimizer, group, table.config, body)

    def _around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]
        @functools.wraps(closure)
        def with_gradients(*args: Any, **kwargs: Any) -> Any:
            self.put_back()
            try:
                return closure(*args, **kwargs)
            finally:
                self.take_aside()

        return with_gradients

    @torch.compiler.disable
    def take_aside(self) -> None:
        self.gradients = {}
        for table in self.rules:
            if table.values.grad is not None:
                self.gradients[table] = table.values.grad
                _aside[table] = self
                table.values.grad = None
        gradients = ((p, p.grad) for p in parameters_of(self.optimizer) if p.grad is not None)
        self._other = next(((p, g, g._version) for p, g in gradients if g.layout is torch.strided), None)

    @torch.compiler.disable
    def refuse_filled(self) -> None:
        """Raises where the optimizer gave the table a gradient of zeros, as some do with parameters that have none, and
        so stepped it by its own rule: once more, or by momentum alone.
        """
        for table in self.gradients:
            filled = table.values.grad
            if filled is not None and not filled.is_sparse and not filled.any():
                table.values.grad = None
                name = type(self.optimizer).__name__
                raise OptionError(
                    f"{name} gives parameters without a gradient one of zeros, and steps the table of the memory by "
                    f"that. This step has moved it: start anew. Build {name} after the plan, of the parameters p for "
                    f"which memcompile.is_table(p) is false, and give the table to another optimizer, as "
                    f"torch.optim.AdamW"
                )

    @torch.compiler.disable
    def put_back(self) -> None:
        """Idempotent."""
        for table, gradient in self.gradients.items():
            if table.values.grad is None:
                table.values.grad = now(gradient)
            _aside.pop(table, None)

    def leave(self, table: ValueTable) -> None:
        """Leaves a table to another optimizer, which steps inside of this one and is no attribute of it."""
        table.values.grad = now(self.gradients.pop(table))
        del self.rules[table], _aside[table]

    @torch.compiler.disable
    def step_rows(self) -> None:
        """Steps the tables whose gradients were aside, and clears these where the class has cleared the others'."""
        cleared = self._cleared()
        for table in self.gradients:
            table.step(self.optimizer, *self.rules[table])
        for table in self.gradients if cleared is not None else ():
            if cleared == "none":
                table.values.grad = None
            elif table.values.grad is not None:
                table.values.grad.zero_()

    def _cleared(self) -> str | None:
        """How the step of the class cleared gradients, "none" or "zeros"; None where it did not."""
        if self._other is None:
            return None
        parameter, gradient, version = self._other
        if parameter.grad is None:
            return "none"
        same = parameter.grad is gradient and gradient._version != version
        return "zeros" if same and not bool(gradient.any()) else None
