"""Optimizers: those alive when a model is planned are adopted; every step gives the values their own learning rate.

Nothing here adds a lasting parameter group: schedulers (LambdaLR, OneCycleLR, SequentialLR) keep lists of one entry
a group, and checkpoints of optimizers are matched by group.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memcompile.runtime.pool import MemoryPool, live_pools

log = logging.getLogger(__name__)


def adopt_optimizers(ffns: Iterable[nn.Parameter], pool: MemoryPool) -> int:
    """Puts the memory's parameters into every live optimizer that holds parameters of the chosen FFNs, and takes those
    out where the memory replaces them.

    A memory parameter joins the group that holds the FFNs' first weight if it is a matrix. A vector joins the group
    of their first bias, else a group of vectors alone (nanoGPT and Hugging Face keep them apart for weight
    decay; Muon even in an optimizer of their own), else the matrices. Within a group it stands where the model's
    order of parameters puts it. Groups keep their number, order and options. Returns how many optimizers were adopted.
    """
    ffns = list(ffns)
    held_in: dict[int, list[dict[str, Any]]] = {id(p): [] for p in ffns}  # the groups that hold each
    adopted: list[Optimizer] = []
    for optimizer in _live_optimizers():
        held = [(p, g) for g in optimizer.param_groups for p in g["params"] if id(p) in held_in]
        if held:
            for parameter, group in held:
                held_in[id(parameter)].append(group)
            if not pool.adds:
                _take_out(optimizer, held_in.keys())
            if isinstance(optimizer, torch.optim.LBFGS):  # its history and size are of all parameters as one vector
                optimizer.state.clear()
                optimizer._numel_cache = None
            adopted.append(optimizer)
            left = "" if pool.adds else "the replaced FFNs left it, "
            log.info("adopted %s: %sthe memory joined it", type(optimizer).__name__, left)
    known = [p for p in ffns if held_in[id(p)]]
    position = {id(parameter): index for index, parameter in enumerate(pool.root.parameters())}
    for name, parameter in pool.memory_parameters() if known else ():
        alike = next((p for p in known if (p.dim() > 1) == (parameter.dim() > 1)), None)
        vectors = _groups_of_vectors(adopted) if parameter.dim() <= 1 else []
        for group in held_in[id(alike)] if alike is not None else vectors[:1] or held_in[id(known[0])]:
            _insert_in_model_order(group, parameter, name, position)
    for optimizer in adopted:
        if isinstance(optimizer, torch.optim.Adagrad):
            _start_adagrad(optimizer)
    return len(adopted)


def _start_adagrad(optimizer: torch.optim.Adagrad) -> None:
    """Gives new parameters their state: Adagrad makes it when it is built (torch 2.11), not in the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                device = parameter.device if group["fused"] else None
                step = torch.zeros((), dtype=torch.get_default_dtype(), device=device)
                total = torch.full_like(parameter, group["initial_accumulator_value"])
                optimizer.state[parameter].update(step=step, sum=total)


def _insert_in_model_order(group: dict[str, Any], parameter: nn.Parameter, name: str, position: dict[int, int]) -> None:
    """Puts the parameter where an optimizer built after planning has it: checkpoints match parameters by position."""
    places = [position.get(id(p), -1) for p in group["params"]]
    index = next((i for i, place in enumerate(places) if place > position[id(parameter)]), len(places))
    group["params"].insert(index, parameter)
    if "param_names" in group:
        group["param_names"].insert(index, name)


def _groups_of_vectors(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group["params"]]
    return [group for group in groups if all(p.dim() <= 1 for p in group["params"])]


def _live_optimizers() -> list[Optimizer]:
    # type(o), not isinstance: a lazy proxy's __class__ may import half a library
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and hasattr(o, "param_groups")]


def _take_out(optimizer: Optimizer, removed_ids: Container[int]) -> None:
    for group in optimizer.param_groups:
        keep = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in removed_ids]
        for parameter in group["params"]:
            if id(parameter) in removed_ids:
                optimizer.state.pop(parameter, None)
        for key in _per_parameter(group):
            group[key][:] = [group[key][index] for index in keep]


# --- the values' own learning rate -----------------------------------------------------------------------------

_SPLIT_FROM = "memcompile_split_from"  # marks a group that lives for one step: (index of its group, positions)
_guarded: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Splits the values off for the step. A closure runs with the user's groups: it may read them, and may raise."""
    _split_values(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure) or not any(_SPLIT_FROM in group for group in optimizer.param_groups):
        return None

    @functools.wraps(closure)
    def with_groups_joined() -> Any:
        _join_values(optimizer)
        loss = closure()
        _split_values(optimizer)
        return loss

    return (
        ((args[0], with_groups_joined, *args[2:]), kwargs)
        if len(args) > 1
        else (args, {**kwargs, "closure": with_groups_joined})
    )


def _split_values(optimizer: Optimizer) -> None:
    """Moves values with a learning rate of their own into groups that live for one step."""
    _join_values(optimizer)  # a step that raised left its groups behind
    rates = {id(pool.values): pool.config.values_lr for pool in live_pools() if pool.config.values_lr is not None}
    if not rates or isinstance(optimizer, torch.optim.LBFGS):  # LBFGS steps along one direction: it has one rate
        return
    if isinstance(getattr(optimizer, "optim", None), Optimizer):  # ZeRO steps another optimizer: that one is split
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
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_join_values)
