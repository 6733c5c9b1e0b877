"""What happens around a step of any optimizer: the values get their own learning rate, and are stepped by rows.

The user's groups look untouched before and after: for one step the values leave theirs, into one that the step ends, or
to a `ValuesStepper`, which steps their rows when the optimizer has done the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memcompile.errors import OptionError
from memcompile.runtime._torch import innermost
from memcompile.runtime.adoption import per_parameter
from memcompile.runtime.counterparts import rate_like, row_optimizer_in, takes_sparse_gradients
from memcompile.runtime.pool import MemoryPool, live_pools
from memcompile.runtime.storage.frozen_values import refuse_gradient
from memcompile.runtime.values_stepper import (
    ValuesStepper,
    release,
    stepper_in,
)

log = logging.getLogger(__name__)

_MARK = "memcompile_for_one_step"  # of groups that live for one


@dataclasses.dataclass(frozen=True)
class _Aside:
    """Values that are not in their group while a step runs."""

    group: int  # its index
    positions: list[int]  # in it
    items: dict[str, list[Any]]  # what the group's lists have at these positions
    stepper: ValuesStepper | None  # who steps them; None is the optimizer, in a group that lives for one step


_aside: weakref.WeakKeyDictionary[Optimizer, list[_Aside]] = weakref.WeakKeyDictionary()
_hooked: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()


def install_step_hooks() -> None:
    """Registers, once, the hook of every optimizer of the process that finds those with values of a memory."""
    register_optimizer_step_pre_hook(_hook_innermost)


def _hook_innermost(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Gives an optimizer with values its two hooks, inside of those that the user registered: they see the values in
    their group, not stepped yet before the step, and stepped after it.
    """
    if optimizer not in _hooked:
        pools = {id(pool.values): pool for pool in live_pools()}
        if not pools or not any(id(p) in pools for group in optimizer.param_groups for p in group["params"]):
            return
        before = optimizer.register_step_pre_hook(_before_step)
        after = optimizer.register_step_post_hook(_after_step)
        optimizer.register_state_dict_pre_hook(_before_saving)
        _hooked[optimizer] = before.id, after.id
    before_id, after_id = _hooked[optimizer]
    innermost(optimizer, before_id, after_id)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Takes the values aside for the step. A closure runs with the user's groups and gradients: it may read them, and
    may raise.
    """
    aside = _take_aside(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure) or not aside:
        return None

    @functools.wraps(closure)
    def with_all_in_place() -> Any:
        _put_back(optimizer)
        loss = closure()
        _take_aside(optimizer)
        return loss

    return (
        ((args[0], with_all_in_place, *args[2:]), kwargs)
        if len(args) > 1
        else (args, {**kwargs, "closure": with_all_in_place})
    )


def _after_step(optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
    for stepper in _put_back(optimizer):
        stepper.step()


def _take_aside(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer has values of a memory."""
    _put_back(optimizer)  # a step that raised left them aside
    pools = {id(pool.values): pool for pool in live_pools()}
    mine = [pools[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in pools]
    for pool in mine:
        if pool.config.frozen:
            refuse_gradient(pool.values)
    if isinstance(optimizer, torch.optim.LBFGS):  # it steps along one direction: it has one rate
        for pool in mine:
            release(pool)
        return False
    if not mine:
        return False
    if isinstance(getattr(optimizer, "optim", None), Optimizer):  # ZeRO steps another optimizer: that one is split
        _refuse_sparse(optimizer, mine)
        return False
    for index, group in enumerate(list(optimizer.param_groups)):
        _split(optimizer, index, group, pools)
    return True


def _before_saving(optimizer: Optimizer) -> None:
    _put_back(optimizer)  # after ctrl-C in a step


@torch.compiler.disable  # where a step is compiled: what it changes is not for graphs
def _split(optimizer: Optimizer, index: int, group: dict[str, Any], pools: dict[int, MemoryPool]) -> None:
    """Moves values that are stepped by rows, or at their own rate, out of a group."""
    moved: dict[int, tuple[float | None, ValuesStepper | None]] = {}  # by position in the group
    for position, parameter in enumerate(group["params"]):
        pool = pools.get(id(parameter))
        if pool is not None:
            to = pool.config.values_lr, _stepper(optimizer, group, pool)
            if to != (None, None) or pool.sharded is not None:  # DTensors are not stepped among tensors
                moved[position] = to
    for rate, stepper in dict.fromkeys(moved.values()):
        positions = [position for position in moved if moved[position] == (rate, stepper)]
        own = {key: [group[key][i] for i in positions] for key in per_parameter(group)}
        _aside.setdefault(optimizer, []).append(_Aside(index, positions, own, stepper))
        if stepper is None:
            lr = group["lr"] if rate is None else rate_like(group["lr"], rate)
            optimizer.param_groups.append({**group, **own, "lr": lr, _MARK: True})
    for key in per_parameter(group) if moved else ():
        group[key][:] = [item for i, item in enumerate(group[key]) if i not in moved]


def _put_back(optimizer: Optimizer) -> list[ValuesStepper]:
    """Puts the values back where the user's groups had them; returns who steps those that the optimizer did not."""
    asides = _aside.pop(optimizer, [])
    if asides:
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if _MARK not in group]
    places = [(aside, rank) for aside in asides for rank in range(len(aside.positions))]
    for aside, rank in sorted(places, key=lambda place: place[0].positions[place[1]]):
        for key, items in aside.items.items():
            optimizer.param_groups[aside.group][key].insert(aside.positions[rank], items[rank])
    return [aside.stepper for aside in asides if aside.stepper is not None]


def _stepper(optimizer: Optimizer, group: dict[str, Any], pool: MemoryPool) -> ValuesStepper | None:
    """Who steps the values of a pool in this group; None is the optimizer itself, with a gradient that it takes."""
    if pool.values_grad == "dense":
        if pool.stepper is not None:  # of values that were cast since
            release(pool)
        return None
    kind = row_optimizer_in(optimizer, group, pool.config)
    if kind is not None:
        stepper = stepper_in(optimizer, pool, kind)
        if not isinstance(stepper, ValuesStepper):
            return None
        stepper.before_step()
        return stepper
    grad = pool.table_grad
    if grad is None:
        return None
    release(pool)
    if grad.is_sparse and (pool.sharded is not None or not takes_sparse_gradients(optimizer, group)):
        _say_dense(type(optimizer).__name__)
        pool.table_grad = grad.to_dense()
    return None


@functools.cache
def _say_dense(name: str) -> None:
    log.warning(
        "%s with these options has no counterpart by rows: the gradient of the memory's values is made dense in each "
        "step, which costs their whole size. Plan with values_optimizer='row_adamw' (or another) to step them by rows",
        name,
    )


def _refuse_sparse(optimizer: Optimizer, pools: list[MemoryPool]) -> None:
    if any(pool.values_grad != "dense" for pool in pools):
        raise OptionError(
            f"{type(optimizer).__name__} keeps the state of each parameter on one rank, and the values' rows are "
            f"stepped on all: plan with values_grad='dense'"
        )
