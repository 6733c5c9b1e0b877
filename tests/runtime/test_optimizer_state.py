"""The state of an optimizer keeps the dtypes that it was saved in, where PyTorch casts it to those of parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from memcompile.runtime.optimizer_state import load_exactly, restore_dtypes


def training() -> tuple[nn.ParameterList, AdamW]:
    parameters = nn.ParameterList([torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)])
    optimizer = AdamW([{"params": [parameters[0]]}, {"params": [parameters[1]]}])
    return parameters, optimizer


def saved() -> dict[str, Any]:
    """Of a training whose moments are fp32, with more digits than bf16 has."""
    parameters, optimizer = training()
    for parameter in parameters:
        moments = {name: torch.full_like(parameter, 1 / 3, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter].update(step=torch.tensor(3.0), count=4, **moments)
    return copy.deepcopy(optimizer.state_dict())


def dtypes(state: dict[str, Any]) -> set[torch.dtype]:
    return {value.dtype for value in state.values() if isinstance(value, Tensor)}


def test_all_of_it():
    parameters, optimizer = training()
    state_dict = saved()
    optimizer.load_state_dict(state_dict)
    assert torch.bfloat16 in dtypes(optimizer.state[parameters[0]])  # what PyTorch does
    load_exactly(optimizer, optimizer.load_state_dict, state_dict)
    for number, parameter in enumerate(parameters):
        state, expected = optimizer.state[parameter], state_dict["state"][number]
        assert dtypes(state) == {torch.float32} and state["count"] == 4
        assert all(torch.equal(state[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_that_of_some_parameters():
    parameters, optimizer = training()
    load_exactly(optimizer, optimizer.load_state_dict, saved(), exact=lambda parameter: parameter is parameters[1])
    assert dtypes(optimizer.state[parameters[0]]) == {torch.bfloat16, torch.float32}  # its step is fp32
    assert dtypes(optimizer.state[parameters[1]]) == {torch.float32}


def test_what_hooks_make_of_the_state_dict():
    """No state appears that it does not have, and entries that a hook casts have its dtype."""
    parameters, optimizer = training()

    def change(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        first = {**state_dict["state"][0], "exp_avg": state_dict["state"][0]["exp_avg"].double()}
        del first["exp_avg_sq"]
        return {**state_dict, "state": {0: first}}

    optimizer.register_load_state_dict_pre_hook(change)
    load_exactly(optimizer, optimizer.load_state_dict, saved())
    assert optimizer.state[parameters[0]]["exp_avg"].dtype is torch.float64
    assert "exp_avg_sq" not in optimizer.state[parameters[0]]
    assert parameters[1] not in optimizer.state
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_after_another_way_of_loading():
    parameters, optimizer = training()
    state_dict = saved()
    optimizer.load_state_dict(state_dict)
    restore_dtypes(optimizer, state_dict, lambda parameter: True)
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], state_dict["state"][0]["exp_avg"])
