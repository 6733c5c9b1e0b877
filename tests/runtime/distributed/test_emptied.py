"""Planned on the meta device, sharded by `fully_shard`, then `to_empty()`: ranks have parts of one drawn memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import memcompile
from tests.models import tiny_gpt
from tests.planned import MEMORY, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.storage.test_drawing import initialise, losses_of, memory_of

TWO_LAYERS: dict[str, Any] = {"memory_layers": 2, "n_keys": 9}  # 81 rows: the ranks' parts differ


def emptied(mesh: dist.DeviceMesh, order: str) -> nn.Module:
    with torch.device("meta"):
        model = tiny_gpt(layers=2)
    memcompile.plan(model, **MEMORY | TWO_LAYERS)
    if order == "empty first":
        model.to_empty(device="cpu")
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    if order == "shard first":
        torch.manual_seed(7 if dist.get_rank() == 0 else 3)
        model.to_empty(device="cpu")
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach() for name, p in memory_of(model).items() if isinstance(p, DTensor)}


def sharded(rank: int) -> dict[str, Any]:
    mesh = dist.init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for order in ("shard first", "empty first"):
        torch.manual_seed(0)
        model = emptied(mesh, order)
        found[order] = whole(model)
        torch.manual_seed(0)
        initialise(model)
        losses = losses_of(model)
        found[f"{order}, learns"] = losses[-1] < losses[0]
    torch.manual_seed(7 if rank == 0 else 3)
    memcompile.reset_parameters(model)
    found["reset"] = whole(model)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(sharded)


def test_it_is_the_memory_of_one_process(ranks):
    """Whatever the seeds of other ranks are."""
    model = planned_gpt(**TWO_LAYERS)
    torch.manual_seed(7)
    memcompile.reset_parameters(model)
    expected = memory_of(model)
    for found in (ranks[0]["shard first"], ranks[1]["shard first"], ranks[0]["reset"]):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_learns(ranks):
    for found in ranks:
        assert found["shard first, learns"] and found["empty first, learns"]
        assert not any(value.isnan().any() for value in found["empty first"].values())
