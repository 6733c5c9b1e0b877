"""Optimizers: those alive when a model is planned are adopted; every step gives the values their own learning rate.

Nothing here adds a lasting parameter group: schedulers (LambdaLR, OneCycleLR, SequentialLR) keep lists of one entry
a group, and checkpoints of optimizers are matched by group.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memcompile.runtime.pool import MemoryPool, live_pools

log = logging.getLogger(__name__)


def adopt_optimizers(removed: Iterable[nn.Parameter], pool: MemoryPool) -> int:
    """Takes the removed parameters out of every live optimizer that holds them and puts the memory's in.

    A memory parameter joins the group of the removed weights if it is a matrix, and that of the removed biases if
    it is a vector (nanoGPT and Hugging Face keep them apart for weight decay). Groups keep their number, order and
    options. Returns how many optimizers were adopted.
    """
    removed_ids = {id(p) for p in removed}
    added = dict(pool.memory_parameters())
    adopted = 0
    for optimizer in _live_optimizers():
        held = [g for g in optimizer.param_groups if any(id(p) in removed_ids for p in g["params"])]
        if held:
            _exchange(optimizer, removed_ids, added)
            adopted += 1
            log.info("adopted %s: the replaced FFNs left it, the memory joined it", type(optimizer).__name__)
    return adopted


def _live_optimizers() -> list[Optimizer]:
    # type(o), not isinstance: a lazy proxy's __class__ may import half a library
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and hasattr(o, "param_groups")]


def _exchange(optimizer: Optimizer, removed_ids: set[int], added: dict[str, nn.Parameter]) -> None:
    home: dict[bool, dict[str, Any]] = {}  # group of the removed matrices (True) and vectors (False)
    for group in optimizer.param_groups:
        keep = []
        for index, parameter in enumerate(group["params"]):
            if id(parameter) in removed_ids:
                home.setdefault(parameter.dim() > 1, group)
                optimizer.state.pop(parameter, None)
            else:
                keep.append(index)
        for key in _per_parameter(group):
            group[key][:] = [group[key][index] for index in keep]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in added.items():
        if id(parameter) not in held:
            group = home.get(parameter.dim() > 1) or next(iter(home.values()))
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(name)


# --- the values' own learning rate -----------------------------------------------------------------------------

_SPLIT_FROM = "memcompile_split_from"  # marks a group that lives for one step: (index of its group, positions)
_guarded: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _split_values(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: moves values with a learning rate of their own into groups that live for this step."""
    _join_values(optimizer)  # a step that raised left its groups behind
    rates = {id(pool.values): pool.config.values_lr for pool in live_pools() if pool.config.values_lr is not None}
    if not rates or isinstance(optimizer, torch.optim.LBFGS):  # LBFGS steps along one direction: it has one rate
        return
    for index, group in enumerate(list(optimizer.param_groups)):
        positions = [i for i, p in enumerate(group["params"]) if id(p) in rates]
        for rate in {rates[id(group["params"][i])] for i in positions}:
            same = [i for i in positions if rates[id(group["params"][i])] == rate]
            own = {**group, "lr": _like(group["lr"], rate), _SPLIT_FROM: (index, same)}
            for key in _per_parameter(group):
                own[key] = [group[key][i] for i in same]
            optimizer.param_groups.append(own)
        for key in _per_parameter(group) if positions else ():
            group[key][:] = [item for i, item in enumerate(group[key]) if i not in positions]
        if positions and optimizer not in _guarded:
            _guarded.add(optimizer)
            optimizer.register_state_dict_pre_hook(_join_values)  # a checkpoint written after ctrl-C in a step


def _join_values(optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """After a step: puts the values back where the user's groups had them."""
    split = [group for group in optimizer.param_groups if _SPLIT_FROM in group]
    if not split:
        return
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if _SPLIT_FROM not in group]
    places = [(own, rank) for own in split for rank in range(len(own["params"]))]
    for own, rank in sorted(places, key=lambda place: place[0][_SPLIT_FROM][1][place[1]]):
        index, positions = own[_SPLIT_FROM]
        for key in _per_parameter(own):
            optimizer.param_groups[index][key].insert(positions[rank], own[key][rank])


def _per_parameter(group: dict[str, Any]) -> list[str]:
    return [key for key in ("params", "param_names") if key in group]


def _like(lr: Any, rate: float) -> Any:
    """A learning rate of the same kind: capturable optimizers hold it in a tensor."""
    return torch.full_like(lr, rate) if isinstance(lr, torch.Tensor) else rate


def install_step_hooks() -> None:
    """Registers the hooks for every optimizer of the process, once."""
    register_optimizer_step_pre_hook(_split_values)
    register_optimizer_step_post_hook(_join_values)
