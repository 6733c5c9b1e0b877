"""Loading the state of an optimizer that holds a table: dtypes, names, and what counts as put there."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from memcompile import PlanError
from memcompile.runtime.pool import pool_of
from tests.planned import assert_same, planned_gpt
from tests.runtime.table.stepping import (
    adamw,
    assert_as_dense,
    model_of,
    snapshot,
    stepped_by_pytorch,
    stored_values,
    train,
)

PLAN = {"layers": 3, "memory_layers": 2, "n_keys": 32, "values_grad": "sparse"}


def build(dtype, state_dtype):
    model = planned_gpt(**PLAN, values_state_dtype=state_dtype).to(dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit(dtype, state_dtype):
    model, optimizer = build(dtype, state_dtype)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    train(model, optimizer, range(4, 8))
    file.seek(0)
    saved = torch.load(file)
    resumed, other = build(dtype, state_dtype)
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    train(resumed, other, range(4, 8))
    assert other.state[resumed.memory_values]["exp_avg"].dtype == getattr(torch, state_dtype)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("first", ["dense", "sparse"])
def test_dense_and_sparse_training_read_each_others_checkpoints(first):
    results = []
    for second in ("dense", "sparse"):
        with stepped_by_pytorch() if first == "dense" else contextlib.nullcontext():
            model = planned_gpt(**PLAN | {"values_grad": first, "values_lr": None}).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, range(4))
        saved = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
        with stepped_by_pytorch() if second == "dense" else contextlib.nullcontext():
            model = planned_gpt(**PLAN | {"values_grad": second, "values_lr": None}).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, range(4, 8))
        results.append({name: p for name, p in model.state_dict().items() if p.is_floating_point()})
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-10)


def test_a_pickled_optimizer_leaves_no_row_behind():
    """Its state has no missed steps; so the values have them."""
    model = planned_gpt(**PLAN).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(4))
    before = stored_values(model)
    torch.save(optimizer, io.BytesIO())
    after = stored_values(model)
    assert not torch.equal(after, before)
    assert torch.equal(model.state_dict()["memory_values"], after)


# --- state that is put into the optimizer -------------------------------------------------------------------------


def test_the_state_that_is_shown():
    """PyTorch's AdamW has the same entries, and theirs are the table's own tensors."""
    model, plain = model_of("sparse"), nn.Parameter(torch.ones(3))
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    state = optimizer.state[model.memory_values]
    plain.grad = torch.ones(3)
    other = AdamW([plain])
    other.step()
    assert state.keys() == other.state[plain].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert isinstance(state["step"], torch.Tensor) and state["step"].item() == 3
    assert state["step"].dtype == other.state[plain]["step"].dtype
    *_, exp_avg, exp_avg_sq = pool_of(model).table.row_state(model.memory_values)
    assert state["exp_avg"].data_ptr() == exp_avg.data_ptr()
    assert state["exp_avg_sq"].data_ptr() == exp_avg_sq.data_ptr()


CHANGES = {
    "cleared": lambda state: state.clear(),
    "another step": lambda state: state.update(step=torch.tensor(50.0)),
    "another exp_avg": lambda state: state.update(exp_avg=2 * state["exp_avg"]),
    "zeros": lambda state: state.update({name: torch.zeros_like(value) for name, value in state.items()}),
    "written in place": lambda state: state["exp_avg_sq"].mul_(4.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_that_is_replaced_counts(change):
    """Rows are up to date before: what they have missed is of the state as it was."""

    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        optimizer.state_dict()  # as whoever reads the state does
        CHANGES[change](optimizer.state[model.memory_values])
        return train(model, optimizer, range(3, 6))

    assert_as_dense(training)


def test_entries_of_the_user_stay():
    model = model_of("sparse")
    optimizer = adamw(model)
    optimizer.state[model.memory_values]["mine"] = "kept"
    train(model, optimizer, range(2))
    assert optimizer.state[model.memory_values]["mine"] == "kept"
    assert optimizer.state_dict()["state"][0]["mine"] == "kept"


# --- names --------------------------------------------------------------------------------------------------------


def test_states_go_to_the_parameters_of_their_names():
    """The run that saved had the same parameters in another order."""
    model = model_of("sparse")
    backwards = AdamW(list(model.parameters())[::-1], lr=1e-2)
    train(model, backwards, range(3))
    saved = copy.deepcopy((model.state_dict(), backwards.state_dict()))
    resumed = model_of("sparse", seed=1)
    optimizer = AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for parameter, twin in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(backwards.state[parameter]["exp_avg"], optimizer.state[twin]["exp_avg"])
    assert_same(snapshot(train(resumed, optimizer, range(3, 5))), snapshot(train(model, backwards, range(3, 5))))


def test_states_of_an_optimizer_that_holds_layers_and_no_table():
    model = model_of("sparse")
    layers = [p for name, p in model.named_parameters() if ".memory." in name]
    backwards, others = SGD(layers[::-1], lr=0.1, momentum=0.9), SGD([model.memory_values], lr=0.1)
    train(model, backwards, range(2))
    optimizer = SGD(layers, lr=0.1, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(backwards.state_dict()))
    for parameter in layers:
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], backwards.state[parameter]["momentum_buffer"])
    assert "memcompile_parameter_names" not in others.state_dict(), "which has not stepped"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_parameter_in_another_group_than_in_the_run_that_saved(decay, caplog):
    """As where one run built its optimizer before the plan, and one after it. Options that differ are told."""
    model = model_of("sparse")
    table, *others = model.parameters()
    before = AdamW([{"params": [table, *others[:3]]}, {"params": others[3:], "weight_decay": decay}], weight_decay=0.0)
    train(model, before, range(2))
    after = AdamW([{"params": others[:3]}, {"params": [table, *others[3:]]}])
    with caplog.at_level(logging.WARNING, "memcompile"):
        after.load_state_dict(copy.deepcopy(before.state_dict()))
    for parameter in model.parameters():
        assert torch.equal(before.state[parameter]["exp_avg"], after.state[parameter]["exp_avg"])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (1 if decay else 0)
    assert not decay or ("AdamW has memory_values in another group" in told[0] and "{'weight_decay': 0.1}" in told[0])


def test_states_of_other_parameters_are_refused():
    model, other = model_of("sparse"), model_of("sparse", memory_layers=1)
    optimizer = adamw(model)
    train(model, optimizer, [0])
    before = copy.deepcopy(optimizer.state_dict())
    saved = adamw(other).state_dict()
    assert len([*model.parameters()]) != len([*other.parameters()]), "PyTorch refuses those"
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(saved)
    renamed = copy.deepcopy(before)
    renamed["memcompile_parameter_names"][0] = "another"
    with pytest.raises(PlanError, match=r"AdamW is of other parameters: it lacks \['memory_values'\].*\['another'\]"):
        optimizer.load_state_dict(renamed)
    assert_states_equal(optimizer.state_dict(), before)


def test_states_in_another_order_without_names_are_refused():
    model = model_of("sparse")
    backwards = AdamW(list(model.parameters())[::-1], lr=1e-2)
    train(model, backwards, [0])
    saved = backwards.state_dict()
    del saved["memcompile_parameter_names"]
    optimizer = adamw(model)
    with pytest.raises(PlanError, match="of parameters in another order: exp_avg"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def assert_states_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert all(torch.equal(actual["state"][number][name], value) for name, value in state.items())
