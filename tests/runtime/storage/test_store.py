"""store_values: from training to a file, in a model that goes on as it was."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import memcompile
from memcompile import PlanError
from memcompile.runtime.pool import pool_of
from memcompile.runtime.storage.frozen_values import MappedValues
from tests.models import tiny_gpt
from tests.planned import batch, planned_gpt
from tests.runtime.storage.stored import SIZES, step, trained


@pytest.fixture
def path(tmp_path):
    return tmp_path / "values.safetensors"


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_the_model_goes_on_as_it_was(path, gradient):
    model, optimizer = trained(values_grad=gradient)
    tokens = batch()[0]
    compiled = torch.compile(model, backend="memcompile", fullgraph=True)
    with torch.no_grad():
        eager, by_graph = model(tokens), compiled(tokens)
    memcompile.store_values(compiled, path)  # rows that are behind are brought up to date
    assert isinstance(model.memory_values, MappedValues)
    memcompile.verify_values(path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), eager)
        torch.testing.assert_close(compiled(tokens), by_graph)
    assert torch.equal(load_file(path)["memory_values"], model.memory_values)

    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} - {id(model.memory_values)}
    assert set(optimizer.state) <= set(model.parameters())
    before = model.memory_values.clone()
    step(model, optimizer)  # the rest
    assert torch.equal(model.memory_values, before)
    assert not pool_of(model).table.row_state(model.memory_values)


def test_the_checkpoint_of_a_stored_model_is_that_of_one_that_learns(path):
    model, _ = trained(values_grad="sparse", values_optimizer="row_adamw")
    expected = model(batch()[0])
    memcompile.store_values(model, path)
    twin = tiny_gpt(layers=2)
    memcompile.plan(twin, memory=memcompile.config_from(model.state_dict()))
    twin.load_state_dict(model.state_dict())
    assert twin.memory_values.requires_grad
    torch.testing.assert_close(twin(batch()[0]), expected)


def test_it_is_stored_again_and_again(path, tmp_path):
    model, _ = trained()
    memcompile.store_values(model, path)
    content = path.read_bytes()
    memcompile.store_values(model, path)
    memcompile.store_values(model, tmp_path / "other")
    assert content == path.read_bytes() == (tmp_path / "other").read_bytes()
    assert model.memory_values.path == str(tmp_path / "other")
    assert pool_of(model).config.values_path == str(tmp_path / "other")
    assert model._ddp_params_and_buffers_to_ignore == ["memory_values"]


def test_one_line_that_follows_changes_nothing(path):
    model, _ = trained()
    memcompile.store_values(model, path)
    values = model.memory_values
    torch.compile(model, backend="memcompile", memory_layers=1, **SIZES)
    assert model.memory_values is values


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS, torch.optim.Adagrad])
def test_optimizers_let_go(path, kind):
    model = planned_gpt(n_keys=16)
    optimizer = kind(model.parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        return loss

    optimizer.step(closure)
    memcompile.store_values(model, path)
    optimizer.step(closure)
    assert model.memory_values.grad is None


def test_a_directory_that_is_not_there(tmp_path):
    model, _ = trained()
    values = model.memory_values
    with pytest.raises(FileNotFoundError, match="no such directory"):
        memcompile.store_values(model, tmp_path / "none" / "values")
    with pytest.raises(IsADirectoryError, match="the name of a file"):
        memcompile.store_values(model, tmp_path)
    assert model.memory_values is values and values.requires_grad


def test_models_without_a_table(path):
    with pytest.raises(PlanError, match="Transformer has no memory: plan it first"):
        memcompile.store_values(tiny_gpt(), path)
    with pytest.raises(PlanError, match="has not all of its values here"):
        memcompile.store_values(planned_gpt().to("meta"), path)
    assert not path.exists()
