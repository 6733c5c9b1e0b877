"""Who reads or writes a sharded table between steps sees what dense training has there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import memcompile
from memcompile.runtime.pool import pool_of
from memcompile.runtime.table.current_values import stored
from tests.planned import batch, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks


def training(rank: int, gradient: str, by: str) -> list[Tensor]:
    model = planned_gpt(layers=2, memory_layers=2, n_keys=16, values_grad=gradient, values_lr=None).double()
    memcompile.shard(model, init_device_mesh("cpu", (2,)), by=by)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    values, average = model.memory_values, model.memory_values.detach().clone()
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        model(*batch(2 * step + rank)).backward()
        optimizer.step()
        with torch.no_grad():
            if step % 2:
                average.lerp_(values, 0.1)
                seen += [values.full_tensor().clone(), average.full_tensor().clone(), (2 * values).to_local().clone()]
            if step == 3:
                values.clamp_(-0.2, 0.2)
            if step == 2:
                assert gradient == "dense" or _has_missed(model)
            if step == 4:
                copied = copy.deepcopy(model)
                seen += [copied.memory_values.to_local().clone(), values.to_local().clone()]
    return [*seen, model.state_dict()["memory_values"].to_local().clone()]


def _has_missed(model: torch.nn.Module) -> bool:
    """Whether rows as they are stored have missed steps."""
    before = stored(pool_of(model).table.part).clone()
    memcompile.flush(model)
    return not torch.equal(before, stored(pool_of(model).table.part))


def everything(rank: int) -> dict[tuple[str, str], list[Tensor]]:
    return {(g, by): training(rank, g, by) for g in ("sparse", "dense") for by in ("columns", "rows")}


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str], list[Tensor]]]:
    return run_on_ranks(everything)


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_reads_and_writes_are_those_of_dense_training(ranks, by):
    for rank in ranks:
        torch.testing.assert_close(rank["sparse", by], rank["dense", by], rtol=0, atol=1e-10)
