"""Names in the state dicts of optimizers that hold a table, by which their states are matched when they are loaded.

PyTorch matches states by position. An optimizer that was built before the model was planned has the memory's parameters
in other places than one that is built after, where the program sorts parameters by name or size.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from memcompile.errors import PlanError
from memcompile.runtime.optimizer_state import numbers_in, parameters_of
from memcompile.runtime.table.table import tables_in

KEY = "memcompile_parameter_names"  # of a state dict: a name for each position, or None
_ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def add_names(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Adds to a state dict the names that the optimizer's parameters have in the model that was planned."""
    state_dict[KEY] = _names(optimizer)


def matched(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict in the order of the optimizer's parameters: by the names that it holds, if it does.

    Raises:
        PlanError: the states are of other parameters.
    """
    saved, own = state_dict.get(KEY), _names(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in state_dict["param_groups"]]:
        return state_dict  # PyTorch says so
    if saved is None or None in [*saved, *own] or len({*saved}) < len(saved):
        _check_shapes(optimizer, state_dict, own)
        return state_dict
    if saved == own:
        return state_dict
    if {*saved} != {*own}:
        lacks, has = [n for n in own if n not in saved][:5], [n for n in saved if n not in own][:5]
        raise PlanError(
            f"the state of {type(optimizer).__name__} is of other parameters: it lacks {lacks}, and has {has} instead. "
            f"Build the optimizer from the same parameters as in the run that saved it"
        )
    number_of = dict(zip(saved, numbers_in(state_dict), strict=True))
    numbers = iter([number_of[name] for name in own])
    groups = [{**g, "params": [next(numbers) for _ in g["params"]]} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups, KEY: own}


def _names(optimizer: Optimizer) -> list[str | None]:
    names: dict[int, str] = {}
    for table, _ in tables_in(optimizer):
        model = table.model() or table.owner
        names |= {id(p): name for name, p in model.named_parameters()}
    return [names.get(id(p)) for p in parameters_of(optimizer)]


def _check_shapes(optimizer: Optimizer, state_dict: dict[str, Any], names: list[str | None]) -> None:
    values = {id(table.values) for table, _ in tables_in(optimizer)}  # whose states may have a number a row
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
