"""Sharded values among PyTorch's other parallelisms, optimizers and tools: training stays that of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import PlanError, backend
from tests.models import tiny_gpt
from tests.planned import MEMORY, plain_attention, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.distributed.sharded import largest_difference, memory_mesh, sharded_gpt, train

SPARSE = {"layers": 3, "memory_layers": 2, "values_grad": "sparse"}
BY_ROWS = {**SPARSE, "values_optimizer": "row_adamw"}  # in whatever optimizer
DENSE = {**SPARSE, "values_grad": "dense"}
TWO, FOUR = (1, 2), (1, 2, 2, 1)
Found = dict[str, Any]


def ddp(
    rank: int, plan: Found, replicas: int = 2, compiled: bool = False, bucket_mb: float | None = None, **options: Any
) -> Found:
    """Two replicas of a memory group of two, or one group; DDP is over all four ranks."""
    model = sharded_gpt(memory_mesh(4, replicas), **plan)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
    run = torch.compile(wrapped, backend="memcompile") if compiled else wrapped
    with plain_attention():
        return train(model, run, FOUR, rank, reduce=False, **options)


def ddp_in_buckets(rank: int) -> Found:
    """Each bucket of DDP's is a graph of its own, and the table is in several."""
    torch._dynamo.reset()
    lower = mock.Mock(side_effect=backend.compile_fx)
    with (
        mock.patch("torch.distributed._DEFAULT_FIRST_BUCKET_BYTES", 1),
        mock.patch.object(backend, "compile_fx", lower),
    ):
        found = ddp(rank, SPARSE, replicas=1, compiled=True, bucket_mb=0.04)
    assert lower.call_count > 2
    return found


def ddp_accumulating(rank: int) -> Found:
    model = sharded_gpt(memory_mesh(4, 2), **SPARSE)
    wrapped = DistributedDataParallel(model)

    def syncs_last(last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else wrapped.no_sync()

    return train(model, wrapped, FOUR, rank, reduce=False, accumulate=syncs_last)


def without_ddp(rank: int) -> Found:
    """Replicas, but the loop averages the rest itself, and accumulates."""
    model = sharded_gpt(memory_mesh(4, 2), **DENSE)
    return train(model, model, FOUR, rank, accumulate=lambda last: contextlib.nullcontext())


def fsdp(rank: int, plan: Found, **options: Any) -> Found:
    mesh = memory_mesh(4, 2)
    model = sharded_gpt(mesh, **plan)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, model, FOUR, rank, reduce=False, **options)


def tensor_parallel(rank: int) -> Found:
    """Two replicas of two ranks with the same tokens; FSDP2 averages over the replicas."""
    mesh = memory_mesh(4, 2)
    model = sharded_gpt(mesh, tokens="shared", **SPARSE)
    fully_shard(model, mesh=mesh["replicate"])
    return train(model, model, TWO, mesh.get_local_rank(0), reduce=False)


def with_optimizer(rank: int, name: str, **options: Any) -> Found:
    model = sharded_gpt(memory_mesh(4, 2), values_optimizer=name, **SPARSE)
    return train(model, model, FOUR, rank, **options)


def recomputed(rank: int, compiled: bool = False) -> Found:
    """Activation checkpointing of every block: its collectives run again in the backward. In graphs they depend on
    nothing there, and ranks of other sizes would order them otherwise.
    """
    model = with_recomputation(sharded_gpt(memory_mesh(4), **SPARSE))
    torch._dynamo.reset()
    run = torch.compile(model, backend="memcompile", fullgraph=True, dynamic=True) if compiled else model
    with plain_attention():
        return train(model, run, FOUR, rank)


def with_recomputation(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    return model


class ClippedAdamW(torch.optim.AdamW):
    """Clips each gradient's numbers before its step."""

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_value_([p for group in self.param_groups for p in group["params"]], 1e-3)
        return super().step(closure)


def clipped_by_value(rank: int) -> Found:
    model = sharded_gpt(memory_mesh(4), **BY_ROWS)
    return train(model, DistributedDataParallel(model), FOUR, rank, reduce=False, optimizer=ClippedAdamW)


def evaluated(rank: int) -> Found:
    """An evaluation between each forward and its backward."""
    model = sharded_gpt(memory_mesh(4, 2), **SPARSE)
    wrapped = DistributedDataParallel(model)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        logits = wrapped(tokens)
        with torch.no_grad():
            wrapped(tokens)
        return logits

    return train(model, run, FOUR, rank, reduce=False)


def moved(rank: int) -> Found:
    """The values lie on another storage before each step, as after `model.cpu()` and `model.cuda()`."""
    model = sharded_gpt(memory_mesh(4), **SPARSE)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        model._apply(lambda tensor: tensor.clone())
        return model(tokens)

    return train(model, run, FOUR, rank)


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except PlanError as error:
        return str(error)
    return ""


def refusals(rank: int) -> dict[str, str]:
    """Stages of a pipeline that would share a table, and a DDP over ranks that have no part in the mesh."""
    model = planned_gpt(layers=4, memory_layers=[0, 2])
    alone = tiny_gpt(layers=4)
    half = nn.Sequential(*alone.blocks[:2])
    memcompile.plan(half, memory_layers=[0], **MEMORY, example_inputs=(torch.randn(2, 5, 32),))

    def stage(module: nn.Module) -> PipelineStage:
        return PipelineStage(module, 0, 4, torch.device("cpu"))

    grid = memory_mesh(4, 2)
    group_of_two = grid["memory"]
    return {
        "spread": told(lambda: stage(nn.Sequential(*model.blocks[:2]))),
        "without its table": told(lambda: stage(nn.Sequential(*planned_gpt(memory_layers=[0]).blocks))),
        "of its own": told(lambda: stage(half)),
        "parallel ddp": told(
            lambda: DistributedDataParallel(sharded_gpt(memory_mesh(4, 2), tokens="shared", **SPARSE))
        ),
        "ddp": told(lambda: DistributedDataParallel(sharded_gpt(group_of_two, **SPARSE))),
    }


# name -> what four ranks run, and what one process does with the joint batch
TRAININGS: dict[str, tuple[Callable[[int], Found], Callable[[], Found]]] = {
    "ddp": (lambda rank: ddp(rank, SPARSE), lambda: alone(SPARSE)),
    "ddp, dense": (lambda rank: ddp(rank, DENSE), lambda: alone(DENSE)),
    "ddp of one group": (lambda rank: ddp(rank, SPARSE, replicas=1), lambda: alone(SPARSE)),
    "ddp, compiled": (lambda rank: ddp(rank, SPARSE, compiled=True), lambda: alone(SPARSE)),
    "ddp, compiled in buckets": (ddp_in_buckets, lambda: alone(SPARSE)),
    "ddp, clipped": (lambda rank: ddp(rank, SPARSE, clip=0.01), lambda: alone(SPARSE, clip=0.01)),
    "ddp, accumulating": (ddp_accumulating, lambda: alone(SPARSE, accumulate=lambda last: contextlib.nullcontext())),
    "no ddp": (without_ddp, lambda: alone(DENSE, accumulate=lambda last: contextlib.nullcontext())),
    "fsdp": (lambda rank: fsdp(rank, SPARSE), lambda: alone(SPARSE)),
    "fsdp, clipped": (lambda rank: fsdp(rank, DENSE, clip=0.01), lambda: alone(DENSE, clip=0.01)),
    "ddp, scaled": (
        lambda rank: ddp(rank, SPARSE, clip=0.01, scaler=torch.amp.GradScaler("cpu")),
        lambda: alone(SPARSE, clip=0.01, scaler=torch.amp.GradScaler("cpu")),
    ),
    "tensor parallel": (tensor_parallel, lambda: alone(SPARSE, sizes=TWO)),
    "recomputed": (recomputed, lambda: alone(SPARSE)),
    "recomputed, compiled": (lambda rank: recomputed(rank, compiled=True), lambda: alone(SPARSE)),
    "evaluated before the backward": (evaluated, lambda: alone(SPARSE)),
    "clipped by value": (clipped_by_value, lambda: alone(BY_ROWS, optimizer=ClippedAdamW)),
    "scaled, fsdp": (
        lambda rank: fsdp(rank, SPARSE, clip=0.01, scaler=torch.amp.GradScaler("cpu")),
        lambda: alone(SPARSE, clip=0.01, scaler=torch.amp.GradScaler("cpu")),
    ),
    "moved": (moved, lambda: alone(SPARSE)),
    **{
        name: (
            lambda rank, name=name: with_optimizer(rank, name),
            lambda name=name: alone({**SPARSE, "values_optimizer": name}),
        )
        for name in ("row_adamw", "lazy_adam", "row_wise_adagrad", "row_sgd")
    },
    "adagrad with decay": (
        lambda rank: with_optimizer(rank, "row_wise_adagrad", weight_decay=0.3),
        lambda: alone({**SPARSE, "values_optimizer": "row_wise_adagrad"}, weight_decay=0.3),
    ),
    "dense sgd": (
        lambda rank: with_optimizer(rank, None, optimizer=torch.optim.SGD, momentum=0.9),
        lambda: alone(SPARSE, optimizer=torch.optim.SGD, momentum=0.9),
    ),
}


def alone(plan: Found, sizes: tuple[int, ...] = FOUR, **options: Any) -> Found:
    model = planned_gpt(**plan).double()
    return train(model, model, sizes, **options)


def on_four(rank: int) -> Found:
    found = {name: train_on_ranks(rank) for name, (train_on_ranks, _) in TRAININGS.items()}
    return {**found, "refusals": refusals(rank)}


@pytest.fixture(scope="module")
def ranks() -> list[Found]:
    return run_on_ranks(on_four, 4)


@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_that_of_one_process(ranks, name):
    expected = TRAININGS[name][1]()
    for rank, found in enumerate(rank[name] for rank in ranks):
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-12)
        for what, allowed in (("gradients", 1e-13), ("parameters", 1e-9), ("state", 1e-12)):
            difference, where = largest_difference(found[what], expected[what])
            assert difference <= allowed, f"rank {rank}: {what} of {where} differ by {difference}"


def test_clipping_clips():
    assert min(alone(SPARSE, clip=0.01)["norms"]) > 0.05


def test_stages_that_would_share_a_table_are_refused(ranks):
    for rank in ranks:
        assert "several stages" in rank["refusals"]["spread"] and "memory_layers" in rank["refusals"]["spread"]
        assert "memcompile.plan(stage" in rank["refusals"]["without its table"]
        assert rank["refusals"]["of its own"] == ""


def test_ddp_around_tensor_parallelism_is_refused(ranks):
    assert all("fully_shard" in rank["refusals"]["parallel ddp"] for rank in ranks)


def test_a_ddp_over_ranks_without_a_part_is_refused(ranks):
    assert all("two dimensions, replicas and memory group" in rank["refusals"]["ddp"] for rank in ranks)
