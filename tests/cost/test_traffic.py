"""Bytes that gloo's sockets really receive in a sharded layer's forward and backward, against the formulas."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.sharding.cases import Case, Sizes
from benchmarks.sharding.traffic import Alone, formulas, with_formulas
from benchmarks.sharding.trainee import Trainee
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.distributed.sharded import memory_mesh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what a socket receives")

TOKENS = 256
CASES: dict[str, tuple[str, int, torch.dtype]] = {
    "columns": ("columns", 128, torch.float32),
    "columns that two do not divide": ("columns", 65, torch.float32),
    "columns in bf16": ("columns", 128, torch.bfloat16),
    "rows": ("rows", 128, torch.float32),
}


def received(rank: int) -> dict[str, dict[str, float]]:
    """Of each case, the bytes of each collective over the formula's."""
    mesh, found = memory_mesh(2), {}
    for name, (by, width, dtype) in CASES.items():
        sizes = Sizes(width=width, n_keys=32, heads=2, top_k=16)
        trainee = Trainee(sizes, mesh, by, dtype)
        trainee.forward_backward(TOKENS)
        with Alone(dist.barrier) as alone:
            trainee.forward_backward(TOKENS)
        expected = formulas(Case(2, by, TOKENS), sizes, rank, "bf16" if dtype is torch.bfloat16 else "fp32")
        found[name] = {one.name: one.of_formula for one in with_formulas(expected, alone.found)}
    return found


@pytest.fixture(scope="module")
def everyones() -> list[dict[str, Any]]:
    return run_on_ranks(received)


@pytest.mark.parametrize("name", CASES)
def test_what_sockets_receive_is_what_the_formulas_say(everyones, name):
    for of_rank in everyones:
        assert len(of_rank[name]) == 4
        assert all(ratio == pytest.approx(1, abs=0.1) for ratio in of_rank[name].values()), of_rank[name]
