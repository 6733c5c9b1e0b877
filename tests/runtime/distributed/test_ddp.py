"""DistributedDataParallel around a planned model, in both orders, against one process with the joint batch.

Two processes run every scenario once; each test reads the result of one. Ranks start from different seeds, so
that equal parameters prove the broadcast of rank 0's.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import memcompile
import memcompile.backend
from memcompile import PlanError
from tests.models import tiny_gpt
from tests.planned import MEMORY, assert_same, batch, gradients
from tests.runtime.distributed.processes import run_on_ranks

PLAN = {"memory_layers": [1], **MEMORY}
STEPS = 2
GRAPHS: list[torch.fx.GraphModule] = []  # what reached Inductor in this process


def dense(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    return tiny_gpt(layers=2).double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def train(run: Callable, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None) -> dict[str, Any]:
    """A few steps on the rank's half of the batch, or on all of it; the first gradients and the last parameters."""
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        tokens, targets = batch(seed=step, size=4)
        part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        optimizer.zero_grad()
        run(tokens[part], targets[part]).backward()
        first = first or gradients(model)
        optimizer.step()
    return {"gradients": first, "parameters": {n: p.detach().clone() for n, p in model.named_parameters()}}


def single_process() -> dict[str, Any]:
    model = dense(0)
    optimizer = optimizer_of(model)
    memcompile.plan(model, **PLAN)
    return train(model, model, optimizer, None)


# --- what the two processes run ---------------------------------------------------------------------------------


def compile_then_ddp(rank: int) -> dict[str, Any]:
    model = dense(rank)
    optimizer = optimizer_of(model)  # nanoGPT's order: optimizer, compile, DDP
    ddp = DistributedDataParallel(torch.compile(model, backend="memcompile", **PLAN))
    return train(ddp, model, optimizer, rank)


def compile_then_ddp_in_buckets(rank: int) -> dict[str, Any]:
    """Small buckets: DDPOptimizer cuts the graph, and hands its parts over with fake inputs."""
    model = dense(rank)
    optimizer = optimizer_of(model)
    GRAPHS.clear()
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024):
        ddp = DistributedDataParallel(torch.compile(model, backend="memcompile", **PLAN), bucket_cap_mb=0.004)
        return train(ddp, model, optimizer, rank) | {"graphs": len(GRAPHS)}


def ddp_then_compile(rank: int) -> dict[str, Any]:
    model = dense(rank)
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp)
    ddp(*batch()).backward()  # a reducer that has run, and hooks on parameters that are about to leave
    compiled = torch.compile(ddp, backend="memcompile", **PLAN)
    result = train(compiled, model, optimizer, rank)
    return result | {"same object": compiled._orig_mod is ddp and ddp.module is model}


def ddp_then_plan(rank: int) -> dict[str, Any]:
    model = dense(rank)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=3, find_unused_parameters=True)
    seen: list[str] = []

    def comm_hook(state, bucket):  # DDP reads annotations, and takes none that is a string
        state.append("reduced")
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(seen, comm_hook)
    handle = ddp.register_forward_hook(lambda *_: seen.append("forward"))
    ddp.eval()
    memcompile.plan(ddp, **PLAN)
    trained = (ddp.training, model.training)
    result = train(ddp.train(), model, optimizer_of(ddp), rank)
    handle.remove()
    return result | {
        "seen": seen,
        "training": trained,
        "hooks left": len(ddp._forward_hooks),
        "options": (ddp.gradient_as_bucket_view, ddp.bucket_bytes_cap, ddp.find_unused_parameters),
    }


def accumulation(rank: int) -> dict[str, Any]:
    model = dense(rank)
    ddp = DistributedDataParallel(model)
    memcompile.plan(ddp, **PLAN)
    tokens, targets = batch(seed=0, size=4)
    for i in range(2):
        part = slice(2 * rank + i, 2 * rank + i + 1)
        with ddp.no_sync() if i == 0 else contextlib.nullcontext():
            (ddp(tokens[part], targets[part]) / 2).backward()
        if i == 0:
            local = gradients(model)
    return {"gradients": gradients(model), "local": local}


def sharded(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    from memcompile.runtime.wrappers import is_sharded

    model = dense(0)
    before = is_sharded(model)
    fully_shard(model)
    try:
        memcompile.plan(model, **PLAN)
    except PlanError as error:
        return {"before": before, "after": is_sharded(model), "message": str(error)}
    return {"message": "planned"}


def ddp_then_plan_inside(rank: int) -> dict[str, Any]:
    """The DDP is kept from whoever plans, and its reducer would never hear of it."""
    model = dense(0)
    ddp = DistributedDataParallel(model)
    try:
        memcompile.plan(model, **PLAN)
    except PlanError as error:
        return {"message": str(error)}
    return {"message": f"planned, in {ddp}"}


def plan_then_shard(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = dense(0)
    memcompile.plan(model, **PLAN)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    result = train(model, model, optimizer_of(model), rank)
    return {key: {n: t.full_tensor() for n, t in tensors.items()} for key, tensors in result.items()}


SCENARIOS = (
    compile_then_ddp,
    compile_then_ddp_in_buckets,
    ddp_then_compile,
    ddp_then_plan,
    accumulation,
    sharded,
    ddp_then_plan_inside,
    plan_then_shard,
)


def run_eagerly(graph_module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Callable:
    GRAPHS.append(graph_module)
    return graph_module.forward


def run_all(rank: int) -> dict[str, Any]:
    memcompile.backend.compile_fx = run_eagerly  # Inductor is not the point
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        try:
            results[scenario.__name__] = scenario(rank)
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
            break  # the other rank may wait in a collective: nothing after this is sound
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(run_all)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return single_process()


def result(ranks: list[dict[str, Any]], scenario: Callable) -> list[dict[str, Any]]:
    found = [rank.get(scenario.__name__, "not run: an earlier scenario failed") for rank in ranks]
    tracebacks = [f"rank {i}:\n{r}" for i, r in enumerate(found) if isinstance(r, str)]
    assert not tracebacks, "\n".join(tracebacks)
    return found


def assert_equal_up_to_rounding(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The mean of two halves and the mean of all are sums in another order: float64, some additions deep."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize(
    "scenario", [compile_then_ddp, compile_then_ddp_in_buckets, ddp_then_compile, ddp_then_plan, plan_then_shard]
)
def test_both_ranks_train_as_one_process_does(scenario, ranks, expected):
    first, second = result(ranks, scenario)
    for key in ("gradients", "parameters"):
        assert_same(first[key], second[key])
        assert_equal_up_to_rounding(first[key], expected[key])
    assert expected["gradients"]["memory_values"].any()


def test_the_graph_was_cut_into_buckets(ranks):
    assert all(r["graphs"] > 1 for r in result(ranks, compile_then_ddp_in_buckets))


def test_ddp_stays_the_object_that_the_user_holds(ranks):
    assert all(r["same object"] for r in result(ranks, ddp_then_compile))


def test_ddp_keeps_its_options_hooks_and_mode(ranks):
    for r in result(ranks, ddp_then_plan):
        assert r["options"] == (True, 3 * 2**20, True)
        assert r["seen"].count("forward") == STEPS
        assert r["seen"].count("reduced") >= STEPS
        assert r["hooks left"] == 0
        assert r["training"] == (False, False)


def test_accumulation_under_no_sync(ranks, expected):
    first, second = result(ranks, accumulation)
    assert_same(first["gradients"], second["gradients"])
    assert_equal_up_to_rounding(first["gradients"], expected["gradients"])
    assert not torch.equal(first["local"]["memory_values"], second["local"]["memory_values"])


def test_a_sharded_model_must_be_planned_first(ranks):
    for r in result(ranks, sharded):
        assert (r["before"], r["after"]) == (False, True)
        assert "Transformer is already sharded: plan before fully_shard()" in r["message"]


def test_the_model_inside_a_ddp_is_not_planned_behind_its_back(ranks):
    for r in result(ranks, ddp_then_plan_inside):
        assert "Transformer is in DDP already" in r["message"] and "pass the DDP itself" in r["message"]
