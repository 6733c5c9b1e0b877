"""A rank that hangs: the others end in an error that names the collective, eager and compiled, forward and backward."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from memcompile import CollectiveError
from tests.planned import batch
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.distributed.sharded import sharded_gpt

PATIENCE = 3.0  # seconds
WAYS = {
    "forward": {"hangs_in": "forward"},
    "backward": {"hangs_in": "backward"},
    "forward, compiled": {"hangs_in": "forward", "compiled": True, "tokens": "even"},
    "backward, compiled": {"hangs_in": "backward", "compiled": True, "tokens": "even"},
    "agreement": {"hangs_in": "forward", "compiled": True},
}


def hang(rank: int, hangs_in: str, compiled: bool = False, tokens: str = "uneven") -> dict[str, Any]:
    """Rank 1 stops before its forward, or before its backward. Each way has a group of its own, which breaks."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=PATIENCE))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("memory",))
    model = sharded_gpt(mesh, tokens=tokens).float()
    torch._dynamo.reset()
    run = torch.compile(model, backend="memcompile", fullgraph=True) if compiled else model
    if compiled:  # so that nothing but the collective takes time
        run(*batch()).backward()
    dist.barrier()
    told, start = "", time.monotonic()
    if rank == 0 or hangs_in == "backward":
        loss = None
        try:
            loss = run(*batch())
            if rank == 0:
                loss.backward()
        except CollectiveError as error:
            told = str(error)
    took = time.monotonic() - start
    dist.barrier()
    return {"told": told, "took": took}


def on_two(rank: int) -> dict[str, dict[str, Any]]:
    return {way: hang(rank, **options) for way, options in WAYS.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(on_two)


@pytest.mark.parametrize(
    ("way", "name", "where"),
    [
        ("forward", "all_reduce", "forward"),
        ("backward", "all_to_all", "backward"),
        ("forward, compiled", "all_gather_into_tensor", "forward"),
        ("backward, compiled", "all_to_all_single", "backward"),
        ("agreement", "all_reduce", "forward"),
    ],
)
def test_the_error_names_the_collective(ranks, way, name, where):
    found = ranks[0][way]
    assert found["told"].startswith(f"the collective {name} failed in the {where}"), found
    assert "init_process_group" in found["told"]
    assert PATIENCE * 0.8 < found["took"] < PATIENCE + 20
