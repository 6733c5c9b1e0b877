"""Values for inference: they stay where they are, whatever happens to the model, and no optimizer steps them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import memcompile
from memcompile import PlanError
from memcompile.runtime.storage.frozen_values import MappedValues, keep_in_place
from tests.models import tiny_gpt
from tests.planned import batch, planned_gpt
from tests.runtime.storage.stored import SIZES, mapped_gpt, step, stored


@pytest.fixture
def path(tmp_path):
    return tmp_path / "values.safetensors"


@pytest.fixture(params=["mmap", "host"])
def model(request, path):
    """A model whose values are trained ones, in a file or in the CPU's memory."""
    rest, expected = stored(path)
    model = mapped_gpt(path)
    if request.param == "host":
        values = model.memory_values
        model = planned_gpt(n_keys=16, values_storage="host")
        rest["memory_values"] = values
    model.load_state_dict(rest)
    assert torch.equal(model(batch()[0]), expected)
    return model


CASTS = {
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "inside": lambda m: torch.nn.Sequential(m).double(),
    "cpu": lambda m: m.cpu(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_they_stay(model, cast):
    values, names = model.memory_values, [name for name, _ in model.named_parameters()]
    where = values.data_ptr()
    CASTS[cast](model)
    assert model.memory_values is values
    assert (values.data_ptr(), values.dtype, values.device.type) == (where, torch.float32, "cpu")
    assert [name for name, _ in model.named_parameters()] == names


def test_a_model_that_was_cast_runs(model):
    expected = model(batch()[0])
    model.bfloat16()
    torch.testing.assert_close(model(batch()[0]).float(), expected, atol=0.1, rtol=0.1)


def test_a_model_built_on_meta(path):
    rest, expected = stored(path)
    with torch.device("meta"):
        model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, values_storage="mmap", values_path=path, **SIZES)
    model.to_empty(device="cpu")
    assert isinstance(model.memory_values, MappedValues)
    model.load_state_dict(rest)
    assert torch.equal(model(batch()[0]), expected)


def test_optimizers_step_the_rest(model):
    before = model.memory_values.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # has them, and they have no gradient
    weight = model.head.weight.clone()
    step(model, optimizer)
    assert not torch.equal(model.head.weight, weight)
    assert torch.equal(model.memory_values, before)
    assert model.memory_values not in optimizer.state


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS])
def test_a_gradient_of_theirs_is_refused(model, kind):
    optimizer = kind(model.parameters(), lr=1e-2)
    model.memory_values.grad = torch.ones(model.memory_values.shape)
    with pytest.raises(PlanError, match="memory_values has a gradient, but its values are for inference"):
        optimizer.step(lambda: torch.zeros(()))


def test_optimizers_of_before_do_not_get_them(path):
    stored(path)
    for storage in ({"values_storage": "mmap", "values_path": path}, {"values_storage": "host"}):
        model = tiny_gpt(layers=2)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
        memcompile.plan(model, memory_layers=1, **SIZES, **storage)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()} - {id(model.memory_values)}
        step(model, optimizer)


def test_ddp_passes_them_by(model):
    assert model._ddp_params_and_buffers_to_ignore == ["memory_values"]


def test_values_of_a_part_of_the_model():
    """They are a parameter of the module that has the layers, which need not be the one that is planned."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    holder = model[0][1]
    holder.memory_values = nn.Parameter(torch.ones(4, 2), requires_grad=False)
    keep_in_place(model)
    values = holder.memory_values
    model.double()
    assert holder.memory_values is values and values.dtype is torch.float32
    assert {holder.weight.dtype, model[0][0].weight.dtype} == {torch.float64}
    ignored = [module._ddp_params_and_buffers_to_ignore for module in (model, model[0], holder)]
    assert ignored == [["0.1.memory_values"], ["1.memory_values"], ["memory_values"]]


def test_values_in_the_hosts_memory_are_drawn_and_loaded(caplog):
    caplog.set_level(logging.INFO, logger="memcompile")
    model = planned_gpt(n_keys=16, values_storage="host")
    twin = planned_gpt(n_keys=16)
    assert torch.equal(model.memory_values, twin.memory_values) and not model.memory_values.requires_grad
    assert "values float32 for inference, in the CPU's memory" in caplog.text
    assert torch.equal(model(batch()[0]), twin(batch()[0]))
    memcompile.reset_parameters(model)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model.memory_values, twin.memory_values)
