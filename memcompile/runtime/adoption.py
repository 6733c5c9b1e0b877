"""Optimizers that are alive when a model is planned are adopted.

Nothing here adds a parameter group: schedulers (LambdaLR, OneCycleLR, SequentialLR) keep lists of one entry a group,
and checkpoints of optimizers are matched by group.
"""

import logging
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memcompile.runtime.optimizer_state import parameters_of
from memcompile.runtime.pool import MemoryPool
from memcompile.runtime.table.hooks import meet
from memcompile.runtime.table.table import tables_in
from memcompile.runtime.wrappers import live_optimizers

log = logging.getLogger(__name__)


def adopt_optimizers(ffns: Iterable[nn.Parameter], pool: MemoryPool, root: nn.Module) -> int:
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
    for optimizer in live_optimizers():
        held = [(p, g) for g in optimizer.param_groups for p in g["params"] if id(p) in held_in]
        if held:
            for parameter, group in held:
                held_in[id(parameter)].append(group)
            _take_out(optimizer, () if pool.adds else held_in.keys())
            adopted.append(optimizer)
            left = "" if pool.adds else "the replaced FFNs left it, "
            log.info("adopted %s: %sthe memory joined it", type(optimizer).__name__, left)
    known = [p for p in ffns if held_in[id(p)]]
    position = {id(parameter): index for index, parameter in enumerate(root.parameters())}
    for name, parameter in pool.memory_parameters() if known else ():
        if not parameter.requires_grad:  # values that are for inference
            continue
        alike = next((p for p in known if (p.dim() > 1) == (parameter.dim() > 1)), None)
        groups = held_in[id(alike)] if alike is not None else []
        if alike is None and parameter.dim() <= 1:
            filled = (group for optimizer in adopted for group in optimizer.param_groups if group["params"])
            groups = [group for group in filled if all(p.dim() <= 1 for p in group["params"])][:1]
        for group in groups or held_in[id(known[0])]:
            _insert_in_model_order(group, parameter, name, position)
    for optimizer in adopted:
        if isinstance(optimizer, torch.optim.Adagrad):
            _start_adagrad(optimizer, pool.values)
        if tables_in(optimizer):
            meet(optimizer)
    return len(adopted)


def leave_optimizers(parameter: nn.Parameter) -> None:
    """Takes a parameter, and its state, out of every optimizer."""
    for optimizer in live_optimizers():
        if any(p is parameter for p in parameters_of(optimizer)):
            _take_out(optimizer, {id(parameter)})


def _start_adagrad(optimizer: torch.optim.Adagrad, values: nn.Parameter) -> None:
    """Gives new parameters their state: Adagrad makes it when it is built (torch 2.11), not in the first step. Values
    have none there before their first step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter is not values and not optimizer.state[parameter]:
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


def _take_out(optimizer: Optimizer, removed_ids: Container[int]) -> None:
    for group in optimizer.param_groups:
        keep = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in removed_ids]
        for parameter in group["params"]:
            if id(parameter) in removed_ids:
                optimizer.state.pop(parameter, None)
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][index] for index in keep]
    if isinstance(optimizer, torch.optim.LBFGS):  # its history and size are of all parameters as one vector
        optimizer.state.clear()
        optimizer._numel_cache = None
