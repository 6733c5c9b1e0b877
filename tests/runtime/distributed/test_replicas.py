"""Sparse gradients under DistributedDataParallel: rows are averaged as a dense gradient is, and replicas stay equal.

Two processes train once each way; the tests compare them.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import memcompile
from memcompile import PlanError
from memcompile.runtime.pool import pool_of
from tests.models import tiny_gpt
from tests.planned import batch, plain_attention, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks

PLAN = {"layers": 3, "memory_layers": 2, "n_keys": 32}
STEPS = 5


def train(rank: int, gradient: str, compiled: bool = False, plan_last: bool = False) -> dict[str, Any]:
    """Ranks start from other seeds and see other tokens. One step accumulates, after another rank 0 alone saves."""
    if plan_last:
        torch.manual_seed(rank)
        model = tiny_gpt(layers=3).double()
        ddp = DistributedDataParallel(model)
        memcompile.plan(ddp, memory_layers=2, n_keys=32, heads=2, top_k=4, key_dim=8, values_grad=gradient)
    else:
        model = planned_gpt(**PLAN, seed=rank, values_grad=gradient).double()
        ddp = DistributedDataParallel(model)
    run = torch.compile(ddp, backend="memcompile") if compiled else ddp
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2, weight_decay=0.1)
    gradients: list[Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if step == 2:
            with ddp.no_sync():
                run(*batch(100 + rank)).backward()
        run(*batch(2 * step + rank)).backward()
        gradients.append(model.memory_values.grad.clone())
        optimizer.step()
        if step == 1 and rank == 0:
            model.state_dict()
    stored = model.memory_values.detach().clone()
    return {
        "gradients": [grad.to_dense() for grad in gradients],
        "sparse": [grad.is_sparse and grad.is_coalesced() for grad in gradients],
        "stored": stored,
        "parameters": {name: p.clone() for name, p in model.state_dict().items() if p.is_floating_point()},
        "moments": optimizer.state_dict()["state"][0]["exp_avg"].clone(),
    }


def joined(rank: int) -> str:
    model = planned_gpt(**PLAN, values_grad="sparse")
    ddp = DistributedDataParallel(model)
    try:
        with ddp.join():
            ddp(*batch(rank)).backward()
    except PlanError as error:
        return str(error)
    return ""


def compiled(rank: int) -> dict[str, Any]:
    with plain_attention():
        return train(rank, "sparse", compiled=True)


def alone(rank: int) -> list[Tensor]:
    """Rank 0 runs a backward through the bare model, and both one whose forward is outside of `no_sync()`."""
    model = planned_gpt(**PLAN, values_grad="sparse").double()
    ddp = DistributedDataParallel(model)
    ddp(*batch(rank)).backward()
    if rank == 0:
        ddp.module(*batch()).backward()
    model.zero_grad()
    loss = ddp(*batch(rank))
    with ddp.no_sync():
        loss.backward()
    return [model.memory_values.grad.to_dense(), model.head.weight.grad.clone()]


def compressed(rank: int) -> list[Tensor]:
    """A communication hook with two collectives a bucket, the second of which is started when the first has ended."""
    model = planned_gpt(**PLAN, values_grad="sparse").double()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        ddp(*batch(2 * step + rank)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def averaged_by_hand(rank: int, what: str, gradient: str) -> list[Tensor]:
    """Data parallelism without DDP: the loop averages the gradients of each step, or the parameters after two."""
    model = planned_gpt(**PLAN, values_grad=gradient).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        model(*batch(2 * step + rank)).backward()
        for p in model.parameters() if what == "gradients" else ():
            dist.all_reduce(p.grad.data)
            p.grad.data /= 2
        optimizer.step()
        for p in model.parameters() if what == "parameters" and step % 2 else ():
            dist.all_reduce(p.data)
            p.data.div_(2)
    return [p.detach().clone() for p in model.parameters()]


def refused_plan(rank: int) -> bool:
    """A DDP that the plan refuses is as it was."""
    ddp = DistributedDataParallel(tiny_gpt(layers=3))
    with contextlib.suppress(PlanError):
        memcompile.plan(ddp, memory_layers=4)  # of three
    ddp(*batch(rank)).backward()
    return pool_of(ddp.module) is None


def everything(rank: int) -> dict[str, Any]:
    return {
        "dense": train(rank, "dense"),
        "sparse": train(rank, "sparse"),
        "compiled": compiled(rank),
        "planned last": train(rank, "sparse", plan_last=True),
        "join": joined(rank),
        "alone": alone(rank),
        "refused plan": refused_plan(rank),
        "compressed": compressed(rank),
        "by hand": {
            (what, gradient): averaged_by_hand(rank, what, gradient)
            for what in ("gradients", "parameters")
            for gradient in ("sparse", "dense")
        },
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(everything)


@pytest.mark.parametrize("way", ["sparse", "compiled", "planned last"])
def test_replicas_are_equal_bit_for_bit(ranks, way):
    first, second = (rank[way] for rank in ranks)
    assert all(first["sparse"]) and all(second["sparse"])
    for one, other in zip(first["gradients"], second["gradients"], strict=True):
        assert one.any() and torch.equal(one, other)
    assert torch.equal(first["stored"], second["stored"])
    assert torch.equal(first["moments"], second["moments"])
    assert all(torch.equal(p, second["parameters"][name]) for name, p in first["parameters"].items())


@pytest.mark.parametrize("way", ["sparse", "compiled"])
def test_rows_are_averaged_as_tables_are(ranks, way):
    ours, dense = ranks[0][way], ranks[0]["dense"]
    for one, other in zip(ours["gradients"], dense["gradients"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    for name, parameter in ours["parameters"].items():
        torch.testing.assert_close(parameter, dense["parameters"][name], rtol=0, atol=1e-10)


def test_what_replicas_cannot_serve_is_refused(ranks):
    assert "join()" in ranks[0]["join"] and "values_grad='dense'" in ranks[0]["join"]


def test_one_rank_may_run_a_backward_alone(ranks):
    """It does not wait for others; and what DDP itself reduces is reduced."""
    for one, other in zip(*(rank["alone"] for rank in ranks), strict=True):
        assert one.any() and torch.equal(one, other)


def test_a_hook_of_the_users_has_collectives_of_its_own(ranks):
    for one, other in zip(*(rank["compressed"] for rank in ranks), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["gradients", "parameters"])
def test_a_loop_that_averages_by_itself(ranks, what):
    for sparse, other, dense in zip(
        ranks[0]["by hand"][what, "sparse"],
        ranks[1]["by hand"][what, "sparse"],
        ranks[0]["by hand"][what, "dense"],
        strict=True,
    ):
        torch.testing.assert_close(sparse, other, rtol=0, atol=1e-12)
        torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-10)


def test_a_plan_that_is_refused_leaves_ddp_as_it_was(ranks):
    assert ranks[0]["refused plan"]


def test_a_copy_is_no_replica():
    pool = pool_of(planned_gpt(**PLAN, values_grad="sparse"))
    pool.table.replicas = object()
    assert copy.deepcopy(pool.owner)._memcompile_pool.table.replicas is None
