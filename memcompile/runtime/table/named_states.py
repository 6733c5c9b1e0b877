"""Names in the state dicts of optimizers that hold parameters of a memory, by which their states are matched when they
are loaded.

PyTorch matches states by position. An optimizer that was built before the model was planned has the memory's parameters
in other places than one that is built after, where the program sorts parameters by name or size.
"""

import itertools
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from memcompile.errors import PlanError
from memcompile.runtime._torch import has_state_dict_hooks
from memcompile.runtime.optimizer_state import numbers_in, parameters_of
from memcompile.runtime.table.table import ValueTable, live_tables
from memcompile.runtime.table.warnings.untrained import parameters_of_memory

log = logging.getLogger(__name__)

_named: weakref.WeakSet[Optimizer] = weakref.WeakSet()

KEY = "memcompile_parameter_names"  # of a state dict: a name for each position, or None
_ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def save_names(optimizer: Optimizer) -> None:
    """From here on the optimizer's state dicts have names, where it holds parameters of a memory."""
    if optimizer not in _named and has_state_dict_hooks(optimizer) and memories_in(optimizer):
        _named.add(optimizer)
        optimizer.register_state_dict_post_hook(_add_names)


def memories_in(optimizer: Optimizer) -> list[ValueTable]:
    """The tables of the memories of which an optimizer holds parameters: of the layers, or the table itself."""
    held = {id(p) for p in parameters_of(optimizer)}
    return [t for t in live_tables if any(id(p) in held for p in parameters_of_memory(t).values())]


def _add_names(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Adds to a state dict the names that the optimizer's parameters have in the model that was planned."""
    state_dict[KEY] = _names(optimizer)


def matched(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict in the order of the optimizer's parameters: by the names that it holds, if it does.

    Raises:
        PlanError: the states are of other parameters.
    """
    saved, own = state_dict.get(KEY), _names(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if len(sizes) != len(saved_sizes):
        return state_dict  # PyTorch says so
    if saved is None or None in [*saved, *own] or len({*saved}) < len(saved):
        if sizes == saved_sizes:  # else PyTorch says so
            _check_shapes(optimizer, state_dict, own)
        return state_dict
    saved, own = _without_common_prefix(saved), _without_common_prefix(own)  # of the modules that were planned
    if {*saved} != {*own}:
        lacks, has = [n for n in own if n not in saved][:5], [n for n in saved if n not in own][:5]
        raise PlanError(
            f"the state of {type(optimizer).__name__} is of other parameters: it lacks {lacks}, and has {has} instead. "
            f"Build the optimizer as the run did that saved it: of the same parameters, before or after the plan"
        )
    if saved == own and sizes == saved_sizes:
        return state_dict
    number_of = dict(zip(saved, numbers_in(state_dict), strict=True))
    groups = [
        {**group, "params": [number_of[name] for name in names]}
        for group, names in zip(state_dict["param_groups"], _divided(own, sizes), strict=True)
    ]
    found = {**state_dict, "param_groups": groups, KEY: own}
    _tell_moved(optimizer, _divided(saved, saved_sizes), found)
    return found


def _names(optimizer: Optimizer) -> list[str | None]:
    names: dict[int, str] = {}
    for table in memories_in(optimizer):
        model = table.model() or table.owner
        names |= {id(p): name for name, p in model.named_parameters()}
    return [names.get(id(p)) for p in parameters_of(optimizer)]


def _without_common_prefix(names: list[Any]) -> list[Any]:
    """Names of one model from whatever module: one run may have planned it with a loss around it."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def _divided(names: list[str | None], sizes: Sequence[int]) -> list[list[str | None]]:
    """The names of each group."""
    rest = iter(names)
    return [list(itertools.islice(rest, size)) for size in sizes]


def _tell_moved(optimizer: Optimizer, before: list[list[str | None]], state_dict: dict[str, Any]) -> None:
    """Warns of parameters that are in a group of other options than in the run that was saved."""
    groups = state_dict["param_groups"]
    after = _divided(state_dict[KEY], [len(group["params"]) for group in groups])
    saved_in = {name: group for group, names in zip(groups, before, strict=True) for name in names}
    own_rate = {id(t.values) for t in live_tables if t.config.values_lr is not None}
    parameters = dict(zip(state_dict[KEY], parameters_of(optimizer), strict=True))
    for group, names in zip(groups, after, strict=True):
        for name in names:
            no_options = {"params", "param_names"} | (
                {"lr", "initial_lr"} if id(parameters[name]) in own_rate else set()
            )
            differing = {k: v for k, v in group.items() if k not in no_options and saved_in[name].get(k) != v}
            if differing:
                log.warning(
                    "memcompile: %s has %s in another group than in the run that was saved, and steps it with %s now. "
                    "Build the optimizer as that run did, before or after the plan",
                    type(optimizer).__name__,
                    name,
                    differing,
                )


def _check_shapes(optimizer: Optimizer, state_dict: dict[str, Any], names: list[str | None]) -> None:
    values = {id(table.values) for table in live_tables}  # whose states may have a number a row
    for parameter, number, name in zip(parameters_of(optimizer), numbers_in(state_dict), names, strict=True):
        state = state_dict["state"].get(number, {}) if id(parameter) not in values else {}
        for entry in _ELEMENTWISE:
            saved = state.get(entry)
            if isinstance(saved, Tensor) and saved.dim() and saved.shape != parameter.shape:
                raise PlanError(
                    f"the state of {type(optimizer).__name__} is of parameters in another order: {entry} "
                    f"{list(saved.shape)} would go to {name or 'a parameter'} {list(parameter.shape)}. The run "
                    f"that saved it had built its optimizer before the model was planned, or sorts its parameters "
                    f"otherwise: build the optimizer as it did"
                )
