"""unwrap: the model inside any nest of wrappers, and the DDP objects met on the way."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import memcompile
from memcompile.runtime.pool import pool_of
from memcompile.runtime.wrappers import is_sharded, unwrap
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [lambda m: m, compiled, DataParallel, lambda m: compiled(DataParallel(compiled(m)))])
def test_wrappers_without_a_process_group(wrap):
    model = tiny_gpt(layers=2)
    wrapped = wrap(model)
    assert unwrap(wrapped) == (model, [])
    explanation = memcompile.plan(wrapped, memory_layers=1, **MEMORY)
    assert pool_of(model).owner is model
    assert explanation.model == "Transformer"
    assert "memory_values" in model.state_dict()


def test_ddp_anywhere_in_the_nest(one_rank):
    model = tiny_gpt(layers=2)
    ddp = DistributedDataParallel(compiled(model))
    wrapped = compiled(ddp)
    assert unwrap(wrapped) == (model, [ddp])
    assert unwrap(ddp) == (model, [ddp])
    memcompile.plan(wrapped, memory_layers=1, **MEMORY)
    ddp(*batch()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_zero_redundancy_optimizer_steps_the_values_by_their_rate(one_rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = tiny_gpt(layers=2)
    memcompile.plan(model, memory_layers=1, **MEMORY)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.5)
    model(*batch()).backward()
    before = model.memory_values.detach().clone()
    optimizer.step()
    moved = before - model.memory_values.detach()
    torch.testing.assert_close(moved, 1e-3 * model.memory_values.grad, rtol=0, atol=1e-7)
    assert len(optimizer.param_groups) == len(optimizer.optim.param_groups) == 1


def test_a_wrapped_module_is_not_sharded():
    assert not is_sharded(tiny_gpt(layers=1))
    assert not is_sharded(DataParallel(tiny_gpt(layers=1)))
