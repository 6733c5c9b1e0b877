"""Training on ranks that share one table is training on one process: outputs, gradients, steps and statistics."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from memcompile.runtime._torch import local_part
from tests.planned import plain_attention, planned_gpt
from tests.runtime.distributed.processes import run_on_ranks
from tests.runtime.distributed.sharded import largest_difference, memory_mesh, sharded_gpt, train

PLAN = {"layers": 4, "memory_layers": 3}
ONE_LAYER = {"layers": 2, "memory_layers": 1}
TABLES = {"layers": 2, "memory_layers": 2, "variant": "memory", "weighting": "sigmoid", "tables": "separate"}
FP32 = (("SGD", torch.optim.SGD, 3), ("AdamW", torch.optim.AdamW, 3), ("first step of AdamW", torch.optim.AdamW, 1))

# name -> ranks, how the values lie, sequences of each rank, plan, whether compiled
TRAININGS: dict[str, tuple[int, dict[str, Any], tuple[int, ...], dict[str, Any], bool]] = {
    "columns, sparse": (2, {"by": "columns"}, (2, 2), {**PLAN, "values_grad": "sparse"}, False),
    "columns, dense": (2, {"by": "columns"}, (3, 1), {**PLAN, "values_grad": "dense"}, False),
    "rows, sparse": (2, {"by": "rows"}, (1, 3), {**PLAN, "values_grad": "sparse"}, False),
    "rows, dense": (2, {"by": "rows"}, (2, 2), {**ONE_LAYER, "values_grad": "dense"}, False),
    "even": (2, {"tokens": "even"}, (2, 2), {**PLAN, "values_grad": "sparse"}, False),
    "no tokens on a rank": (2, {}, (0, 3), {**PLAN, "values_grad": "sparse"}, False),
    "plain, sigmoid, a table each": (2, {}, (2, 1), {**TABLES, "values_grad": "sparse"}, False),
    "pkm in eval mode": (2, {"by": "rows"}, (1, 2), {**ONE_LAYER, "variant": "pkm", "values_grad": "sparse"}, False),
    "pairs": (2, {}, (2, 1), {**PLAN, "variant": "peer", "query_norm": "none", "values_grad": "sparse"}, False),
    "compiled columns": (2, {"by": "columns"}, (3, 1), {**PLAN, "values_grad": "sparse"}, True),
    "compiled rows": (2, {"by": "rows"}, (1, 2), {**ONE_LAYER, "values_grad": "dense"}, True),
    "compiled, even": (2, {"tokens": "even"}, (2, 2), {**ONE_LAYER, "values_grad": "sparse"}, True),
    "one rank": (1, {}, (3,), {**PLAN, "values_grad": "sparse"}, False),
    "four ranks, uneven columns": (4, {}, (1, 0, 3, 2), {**PLAN, "values_grad": "sparse", "value_dim": 10}, False),
    "four ranks, empty columns": (4, {}, (1, 2, 3, 2), {**PLAN, "values_grad": "dense", "value_dim": 2}, False),
    "four ranks, rows": (4, {"by": "rows"}, (1, 0, 3, 2), {**PLAN, "values_grad": "sparse"}, False),
    "four ranks, compiled": (4, {}, (1, 0, 3, 2), {**ONE_LAYER, "values_grad": "sparse", "value_dim": 10}, True),
}


def run_training(rank: int, name: str) -> dict[str, Any]:
    ranks, how, sizes, plan, compiled = TRAININGS[name]
    model = sharded_gpt(memory_mesh(ranks), **how, **plan).train("eval mode" not in name)
    torch._dynamo.reset()
    run = torch.compile(model, backend="memcompile", fullgraph=True, dynamic=True) if compiled else model
    with plain_attention():
        found = train(model, run, sizes, rank)
    table = model.memory_values
    assert isinstance(table, DTensor) and local_part(table.grad).is_sparse == (plan["values_grad"] == "sparse")
    return found


def expected_training(name: str) -> dict[str, Any]:
    _, _, sizes, plan, _ = TRAININGS[name]
    model = planned_gpt(**plan).double().train("eval mode" not in name)
    return train(model, model, sizes)


def parallel_pkm(rank: int | None) -> dict[str, Any]:
    """Tensor parallelism, or one process: all ranks have all tokens, so statistics and balance loss are the same."""
    plan = {**ONE_LAYER, "variant": "pkm", "balance_loss": 0.1, "gate": True}
    model = planned_gpt(**plan).double() if rank is None else sharded_gpt(memory_mesh(2), tokens="shared", **plan)
    return train(model, model, (3,), foreach=False)


def one_token(rank: int, compiled: bool) -> dict[str, Any]:
    """BatchNorm where the second rank has one token: in training, then with more, and in eval mode. Compiled graphs run
    without Inductor, which takes long and is not what is asked.
    """
    model = sharded_gpt(memory_mesh(2), **ONE_LAYER, variant="pkm")
    torch._dynamo.reset()
    run = torch.compile(model, backend="memcompile", fullgraph=True) if compiled else model
    tokens, start = torch.zeros(1, 1 if rank else 4, dtype=torch.long), dict(model.named_buffers())
    start = {name: buffer.clone() for name, buffer in start.items()}
    with plain_attention(), mock.patch("memcompile.backend.compile_fx", lambda graph, *rest: graph):
        try:
            run(tokens)
            told = ""
        except ValueError as error:
            told = str(error)
        kept = all(torch.equal(buffer, start[name]) for name, buffer in model.named_buffers())
        after = run(tokens.expand(2, -1)).isfinite().all() and model.eval()(tokens).isfinite().all()
    return {"told": told, "kept": kept, "after": bool(after)}


def in_fp32(rank: int) -> dict[str, Any]:
    """SGD, and compiled AdamW, by their names; and AdamW's first step."""
    found = {}
    for name, optimizer, steps in FP32:
        model = sharded_gpt(memory_mesh(2), tokens="even", **PLAN).float()
        torch._dynamo.reset()
        compiled = optimizer is torch.optim.AdamW
        run = torch.compile(model, backend="memcompile", fullgraph=True) if compiled else model
        found[name] = train(model, run, (2, 2), rank, steps, optimizer)["parameters"]
    return found


def trainings(rank: int, ranks: int) -> dict[str, Any]:
    return {name: run_training(rank, name) for name, (number, *_) in TRAININGS.items() if number == ranks}


def on_one(rank: int) -> dict[str, Any]:
    return trainings(rank, 1)


def on_two(rank: int) -> dict[str, Any]:
    found = trainings(rank, 2)
    found["fp32"] = in_fp32(rank)
    found["parallel pkm"] = parallel_pkm(rank)
    found["one token"] = {way: one_token(rank, way == "compiled") for way in ("eager", "compiled")}
    return found


def on_four(rank: int) -> dict[str, Any]:
    return trainings(rank, 4)


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {1: run_on_ranks(on_one, 1), 2: run_on_ranks(on_two, 2), 4: run_on_ranks(on_four, 4)}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_that_of_one_process(ranks, name):
    """Outputs, all gradients, three steps of AdamW, in fp64: to rounding."""
    expected = expected_training(name)
    everyone = [found[name] for found in ranks[TRAININGS[name][0]]]
    losses = torch.tensor([found["losses"] for found in everyone], dtype=torch.float64).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"], dtype=torch.float64), rtol=1e-12, atol=1e-13)
    for rank, found in enumerate(everyone):
        for what, allowed in (("gradients", 1e-13), ("parameters", 1e-9), ("state", 1e-12)):
            difference, where = largest_difference(found[what], expected[what])
            assert difference <= allowed, f"rank {rank}: {what} of {where} differ by {difference}"


def test_tensor_parallel_batch_norm_and_balance_loss(ranks):
    """Gradients, parameters and running statistics."""
    expected = parallel_pkm(None)
    moved = {"mean": 0, "var": 1}
    for found in ranks[2]:
        parameters = found["parallel pkm"]["parameters"]
        for end, start in moved.items():
            (running,) = (tensor for name, tensor in parameters.items() if name.endswith(f"memory.query_{end}"))
            assert (running != start).all()
        for what in ("gradients", "parameters"):
            difference, where = largest_difference(found["parallel pkm"][what], expected[what])
            assert difference <= 1e-9, f"{what} of {where} differ by {difference}"


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_all_ranks_are_told_that_one_has_too_few_tokens_for_batch_norm(ranks, way):
    first, second = (found["one token"][way] for found in ranks[2])
    assert first == second
    assert first["kept"] and first["after"]
    assert (
        "needs more than one token in training" in first["told"] and "a rank of the memory group has 1" in first["told"]
    )


def test_the_drift_in_fp32_is_of_gradients_that_are_zero(ranks):
    """Sums over ranks are rounded otherwise. AdamW divides gradients by their own size: where one is zero but for
    rounding (the bias of attention's keys, half-keys that are hardly hit) it makes steps of rounding errors, in one
    process as on ranks, as large as the learning rate. SGD does not. The first step shows which those are: in the next
    ones the gradients of all others are of parameters that have drifted.
    """
    drifts = {}
    for way, optimizer, steps in FP32:
        model = planned_gpt(**PLAN)
        expected = train(model, model, (2, 2), steps=steps, optimizer=optimizer)["parameters"]
        found = ranks[2][0]["fp32"][way]
        drifts[way] = {name: (found[name] - expected[name]).abs() for name in expected}
    assert max(float(drift.max()) for drift in drifts["SGD"].values()) < 1e-6
    exact = planned_gpt(**PLAN).double()
    gradients = train(exact, exact, (2, 2), steps=1)["gradients"]
    assert max(float(drift.max()) for drift in drifts["AdamW"].values()) > 1e-4  # or there would be nothing to explain
    for name, drift in drifts["first step of AdamW"].items():
        worst = drift[gradients[name].abs() > 1e-5]
        assert not len(worst) or float(worst.max()) < 1e-6, name
