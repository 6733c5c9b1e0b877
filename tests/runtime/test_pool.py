"""The pool: one table of values on the root, found from any part of the model, one for each copy of it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import memcompile
from memcompile.runtime.pool import live_pools, pool_of, pools_inside
from tests.models import ZOO, tiny_gpt
from tests.planned import MEMORY, batch, planned_gpt


def test_the_values_are_one_parameter_of_the_root():
    model = planned_gpt(layers=4, memory_layers=3)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "values" in name]
    assert names == ["memory_values"]
    pool = pool_of(model)
    assert pool.values is model.memory_values
    assert pool.values.shape == (64, 32)
    assert all(layer.tensors(pool.values)["values"] is model.memory_values for layer in pool.layers.values())


def test_memory_parameters_have_readable_names():
    model = planned_gpt()
    layer = [
        f"blocks.1.ffn.2.memory.{name}"
        for name in "query_weight query_bias half_keys gate_weight gate_bias out_weight out_bias".split()
    ]
    assert [name for name, _ in pool_of(model).memory_parameters()] == ["memory_values", *layer]
    assert set(dict(model.named_parameters())) - set(dict(tiny_gpt(layers=2).named_parameters())) == {
        "memory_values",
        *layer,
    }


def test_an_ffn_that_layers_share_is_one_memory():
    model, inputs = ZOO["shared"]()
    memcompile.plan(model, memory_layers=1, **MEMORY)
    pool = pool_of(model)
    assert len(pool.layers) == 1
    assert pool.chosen[0].calls == 4
    calls = []
    (layer,) = pool.layers.values()
    layer.register_forward_hook(lambda *_: calls.append(1))
    model(*inputs)
    assert len(calls) == 4


def test_the_pool_is_found_from_every_part_and_from_no_stranger():
    model, stranger = planned_gpt(), tiny_gpt(layers=1)
    pool = pool_of(model)
    assert all(pool_of(module) is pool for module in model.modules())
    assert pool_of(stranger) is None
    assert pools_inside(nn.Sequential(model)) == [pool]
    assert pools_inside(model) == []


def test_a_dead_model_leaves_no_pool():
    model = planned_gpt()
    pool, values = weakref.ref(pool_of(model)), weakref.ref(model.memory_values)
    assert pool() in set(live_pools())
    del model
    gc.collect()
    assert pool() is None
    assert values() is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_planned_model_of_its_own(duplicate):
    model, (tokens, _) = planned_gpt(), batch()
    twin = duplicate(model)
    pool = pool_of(twin)
    assert pool is not pool_of(model)
    assert pool.owner is twin
    assert pool in set(live_pools())
    assert pool.values is twin.memory_values is not model.memory_values
    assert all(layer.pool is pool for layer in pool.layers.values())
    expected = model(tokens)
    assert torch.equal(twin(tokens), expected)
    with torch.no_grad():
        twin.memory_values.zero_()
    assert torch.equal(model(tokens), expected)
    assert not torch.equal(twin(tokens), expected)


def test_a_model_planned_by_a_lambda_can_be_pickled():
    model, (tokens, _) = planned_gpt(layers=4, memory_layers=lambda site: "2" in site.name), batch()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(tokens), model(tokens))
    assert pool_of(twin).requested.memory_layers == ("blocks.2.ffn.2.weight",)
    assert callable(pool_of(model).requested.memory_layers)


def test_a_copy_that_fails_half_way_leaves_no_live_pool():
    model, (tokens, targets) = planned_gpt(memory_layers=[0]), batch()
    model.blocks[1].cache = 2 * torch.ones(3, requires_grad=True)  # only leaves can be copied
    before = set(live_pools())
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(model)
    assert set(live_pools()) == before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens, targets).backward()
    optimizer.step()
