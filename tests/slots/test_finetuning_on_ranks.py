"""Ranks that train one model move the slots that one process with all of their tokens would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import memcompile
from memcompile.errors import PlanError
from tests.planned import batch, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.distributed.sharded import VALUES, memory_mesh, whole

PLAN: dict[str, Any] = {"n_keys": 16, "top_k": 2, "memory_layers": 2, "values_lr": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "columns": {"by": "columns", "values_grad": "sparse"},
    "rows": {"by": "rows", "values_grad": "sparse"},
    "rows, dense": {"by": "rows", "values_grad": "dense"},
    "DDP": {"values_grad": "dense"},
}
BACKGROUND, STEPS = 3, 3


def train(model: nn.Module, parts: list[int]) -> Tensor:
    """Finetunes on the parts, of two, of each batch; the table afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)

    def tokens(seed: int) -> list[Tensor]:
        return [batch(seed, 4)[0].chunk(2)[part] for part in parts]

    background = [part for seed in range(BACKGROUND) for part in tokens(10 + seed)]
    with memcompile.finetune_slots(model, background=background, top_t=9):
        for step in range(STEPS):
            optimizer.zero_grad()
            torch.cat([model(part) for part in tokens(step)]).square().mean().backward()
            optimizer.step()
    memcompile.flush(model)
    return whole(getattr(model, "module", model).get_parameter(VALUES))


def on_a_rank(rank: int, name: str) -> Tensor:
    options = dict(WAYS[name])
    by = options.pop("by", None)
    model = planned_gpt(**PLAN, **options).double()
    if by is None:
        model = DistributedDataParallel(model)
        refused = DistributedDataParallel(planned_gpt(**PLAN, values_grad="sparse").double())
        with pytest.raises(PlanError, match="plan with values_grad='dense', or share the table"):
            memcompile.finetune_slots(refused, background=[batch()[0]], top_t=1).__enter__()
    else:
        memcompile.shard(model, memory_mesh(2), by=by)
    return train(model, [rank])


@pytest.mark.parametrize("name", WAYS)
def test_ranks_move_the_slots_of_one_process(name):
    first = planned_gpt(**PLAN).double()
    expected = train(first, [0, 1])
    one, other = run_on_ranks(_OnARank(name))
    torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(one, other)
    moved = (expected != planned_gpt(**PLAN).double().get_parameter(VALUES)).any(1).sum()
    assert 9 <= moved <= 9 * STEPS


class _OnARank:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, rank: int) -> Tensor:
        return on_a_rank(rank, self.name)
