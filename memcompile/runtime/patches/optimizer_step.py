"""The step of each class of optimizers that hold tables: it runs inside of `step_with_tables`.

No public way: hooks run before and after a step, but not where it raises; and hooks of the user that were registered
earlier run after ours, or later before ours.
Until: PyTorch has hooks that run whether a step raises or not.
The same: optimizers that hold no table, of these classes too.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from memcompile.common.patch import Patch
from memcompile.errors import PlanError
from memcompile.runtime._torch import body_of_step
from memcompile.runtime.table.hooks import holds_tables, step_with_tables


class _Steps:
    """A hook of every optimizer of the process finds those that hold tables. The class of one is changed before the
    first of its steps runs.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._cells: list[tuple[CellType, Callable[..., Any]]] = []  # with what they held
        self._classes: list[tuple[weakref.ref[type], Callable[..., Any]]] = []

    def install(self) -> None:
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        for cell, body in self._cells:
            if _is_ours(cell.cell_contents):
                cell.cell_contents = body
        for reference, step in self._classes:
            kind = reference()
            if kind is not None and _is_ours(vars(kind)["step"]):
                kind.step = step  # type: ignore[attr-defined]
        self._cells, self._classes = [], []

    @torch.compiler.disable  # where a step is compiled: what hooks do is not for graphs
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if holds_tables(optimizer):
            self._change(type(optimizer))

    def _change(self, kind: type[Optimizer]) -> None:
        """Changes the step of a class: that of a parent where its own calls it, which then sees gradients before, and
        rows that have moved after. Idempotent.
        """
        owners = [owner for owner in kind.__mro__ if "step" in vars(owner) and owner is not Optimizer]
        for index, owner in enumerate(owners):
            step = vars(owner)["step"]
            cell = body_of_step(step)
            if cell is None and index == 0:
                raise PlanError(
                    f"memcompile cannot step the table where {owner.__name__}.step was replaced by a function that "
                    f"hides it: decorate that function with functools.wraps({owner.__name__}.step)"
                )
            body = step if cell is None else cell.cell_contents
            parents = [p for p in owners[index + 1 :] if inspect.unwrap(vars(p)["step"]) is not inspect.unwrap(body)]
            if not _is_ours(body) and parents and calls_parent(body, parents):
                continue
            if cell is not None and not _is_ours(body):
                self._cells.append((cell, body))
                cell.cell_contents = _with_tables(body)
            elif not _is_ours(body):  # PyTorch adds its hooks when the first of this class is built
                self._classes.append((weakref.ref(owner), body))
                owner.step = _with_tables(body)  # type: ignore[attr-defined]
            return


def _with_tables(body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return step_with_tables(body, optimizer, args, kwargs)

    return step


_OURS = _with_tables(lambda: None).__code__


def _is_ours(function: Any) -> bool:
    return getattr(function, "__code__", None) is _OURS


def calls_parent(step: Callable[..., Any], parents: Iterable[type]) -> bool:
    """Whether a step calls that of a class which its own is derived from, and so leaves the parameters to it."""
    names = {name for code in _codes_in(step) for name in (*code.co_names, *code.co_freevars)}
    return "step" in names and not names.isdisjoint({"super", "__class__", *(parent.__name__ for parent in parents)})


def _codes_in(function: Any) -> Iterator[CodeType]:
    """Of a function, those inside of it, and what it decorates."""
    while function is not None:
        codes: list[CodeType] = [function.__code__] if hasattr(function, "__code__") else []
        for code in codes:
            yield code
            codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        function = getattr(function, "__wrapped__", None)


PATCH = Patch(_Steps())
