"""Checkpoints of models that `memcompile.shard` sharded and that are stepped by rows: saved by two ranks, gone on with
by two that shard otherwise, and by one process. Values and the state of their rows are the same bit for bit.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memcompile
import memcompile.checkpoint
from tests.planned import planned_gpt
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.distributed.sharded import largest_difference, memory_mesh, sharded_gpt, train, whole

SIZES = (2, 1)
BOTH = ("columns", "rows")
# How the loaded tables lie. A new one lies as the first says.
KINDS: dict[str | None, tuple[str, ...]] = {
    None: BOTH, "row_wise_adagrad": BOTH, "lazy_adam": BOTH, "of pairs": ("rows",),
}  # fmt: skip


def plan(kind: str | None) -> dict[str, Any]:
    options = {"variant": "peer", "query_norm": "none"} if kind == "of pairs" else {"values_optimizer": kind}
    return {"layers": 3, "memory_layers": 2, "values_grad": "sparse", **options}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None) -> dict[str, Any]:
    return train(model, model, SIZES, rank, steps=2, optimizer=lambda *args, **kwargs: optimizer)


def facts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The values and their state, whole."""
    values = model.memory_values
    optimizer.state_dict()  # brings rows up to date
    return {"values": whole(values), **{name: whole(t) for name, t in optimizer.state[values].items()}}


def train_and_save(rank: int, folder: str) -> dict[str | None, dict[str, Any]]:
    found: dict[str | None, dict[str, Any]] = {}
    for kind in KINDS:
        model = sharded_gpt(memory_mesh(2), **plan(kind))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        steps(model, optimizer, rank)
        memcompile.checkpoint.save(Path(folder, str(kind)), model, optimizer, step=2)
        saved = facts(model, optimizer)
        found[kind] = {"saved": saved, "gone on": steps(model, optimizer, rank)}
    return found


def load_and_go_on(rank: int, folder: str) -> dict[tuple[str | None, str], dict[str, Any]]:
    found = {}
    for kind in KINDS:
        for by in KINDS[kind]:
            model = sharded_gpt(memory_mesh(2), by=by, **plan(kind), seed=7)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            memcompile.checkpoint.load(Path(folder, str(kind)), model, optimizer)
            loaded = facts(model, optimizer)
            found[kind, by] = {"loaded": loaded, "gone on": steps(model, optimizer, rank)}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    saved = run_on_ranks(functools.partial(train_and_save, folder=folder))
    loaded = run_on_ranks(functools.partial(load_and_go_on, folder=folder))
    return {"folder": folder, "saved": saved, "loaded": loaded}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize(("kind", "by"), [(kind, by) for kind in KINDS for by in KINDS[kind]])
def test_two_ranks_go_on(runs, kind, by):
    for before, after in zip(runs["saved"], runs["loaded"], strict=True):
        assert_equal(after[kind, by]["loaded"], before[kind]["saved"])
        expected, found = before[kind]["gone on"], after[kind, by]["gone on"]
        assert largest_difference(found["parameters"], expected["parameters"])[0] < 1e-9
        if by == KINDS[kind][0]:  # the same sums in the same order
            assert_equal(found["parameters"], expected["parameters"])
            assert found["losses"] == expected["losses"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on(runs, kind):
    model = planned_gpt(**plan(kind), seed=7).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    memcompile.checkpoint.load(Path(runs["folder"], str(kind)), model, optimizer)
    before = runs["saved"][0][kind]
    assert_equal(facts(model, optimizer), before["saved"])
    gone_on = steps(model, optimizer, None)
    assert largest_difference(gone_on["parameters"], before["gone on"]["parameters"])[0] < 1e-9
