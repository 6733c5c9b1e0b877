"""Where a graph reads the values outside of its layers too, their gradient is dense, and what it should be."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memcompile.passes.checks.captured_memory import POSITIONS, is_lookup
from tests.planned import batch, plain_attention, planned_gpt, stop_before_inductor

PLAN = {"layers": 4, "memory_layers": 2, "n_keys": 32, "values_grad": "sparse"}
BATCH = batch()


def plain(model):
    return model(*BATCH)


def penalised(model):
    return model(*BATCH) + model.memory_values.pow(2).mean()


def checkpointed_and_penalised(model):
    return checkpoint(model, *BATCH, use_reentrant=False) + model.memory_values.abs().mean()


@pytest.mark.parametrize(("loss", "layout"), [(plain, torch.sparse_coo), (penalised, torch.strided)])
@plain_attention()
def test_the_gradient_is_sparse_unless_something_else_reads_the_values(loss, layout):
    model, eager = (planned_gpt(**PLAN).double() for _ in range(2))
    torch.compile(loss, backend="memcompile", fullgraph=True)(model).backward()
    loss(eager).backward()
    assert model.memory_values.grad.layout is layout
    expected = eager.memory_values.grad.to_dense()
    torch.testing.assert_close(model.memory_values.grad.to_dense(), expected, rtol=0, atol=1e-14)


def test_lookups_inside_bodies_are_found(monkeypatch):
    graphs = stop_before_inductor(monkeypatch, lambda graph, inputs: graph.forward)
    model = planned_gpt(**PLAN)
    torch.compile(checkpointed_and_penalised, backend="memcompile", fullgraph=True)(model)
    (graph,) = graphs
    bodies = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    found = [node for body in bodies for node in body.graph.nodes if is_lookup(node)]
    assert len(found) == 2 and {node.args[POSITIONS["values_grad"]] for node in found} == {"dense"}
