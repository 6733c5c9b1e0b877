"""Bytes that gloo's sockets really receive in a sharded layer's forward and backward, against the formulas."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.sharding.cases import Case, Sizes
from benchmarks.sharding.traffic import Alone, beside, formulas
from benchmarks.sharding.trainee import Trainee
from tests.runtime.distributed import run_on_ranks
from tests.runtime.sharded import memory_mesh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what a socket receives")

IDEAL = ("all_gather", "all_to_all")  # gloo sends no more than it must
TOKENS = 256
CASES: dict[str, tuple[str, int, torch.dtype]] = {
    "columns": ("columns", 128, torch.float32),
    "columns that two do not divide": ("columns", 65, torch.float32),
    "columns in bf16": ("columns", 128, torch.bfloat16),
    "rows": ("rows", 128, torch.float32),
}


def received(rank: int) -> dict[str, list[tuple[str, str, float, float]]]:
    """Of each case: name, operation, bytes over the formula's, and over what gloo's algorithm brings."""
    mesh, found = memory_mesh(2), {}
    for name, (by, width, dtype) in CASES.items():
        sizes = Sizes(width=width, n_keys=32, heads=2, top_k=16)
        trainee = Trainee(sizes, mesh, by, dtype)
        trainee.forward_backward(TOKENS)
        with Alone(dist.barrier) as alone:
            trainee.forward_backward(TOKENS)
        expected = formulas(Case(2, by, TOKENS), sizes, rank, dtype.itemsize)
        every = beside(expected, alone.found)
        found[name] = [(one.name, one.operation, one.of_formula, one.of_gloo) for one in every]
    return found


@pytest.fixture(scope="module")
def everyones() -> list[dict[str, Any]]:
    return run_on_ranks(received)


@pytest.mark.parametrize("name", CASES)
def test_what_sockets_receive_is_what_the_formulas_say(everyones, name):
    for of_rank in everyones:
        ideal = [ratio for _, operation, ratio, _ in of_rank[name] if operation in IDEAL]
        assert len(ideal) == (2 if CASES[name][0] == "rows" else 3)
        assert all(ratio == pytest.approx(1, abs=0.1) for ratio in ideal), of_rank[name]


@pytest.mark.parametrize("name", CASES)
def test_gloo_sums_for_everyone_and_keeps_a_part(everyones, name):
    """A reduce-scatter brings at least the formula's bytes; today's gloo brings those of an all-reduce."""
    for of_rank in everyones:
        sums = [(ratio, gloo) for _, operation, ratio, gloo in of_rank[name] if operation == "reduce_scatter"]
        assert sums and all(ratio >= 1 and gloo <= 1.1 for ratio, gloo in sums), of_rank[name]
