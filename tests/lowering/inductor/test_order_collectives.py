"""Collectives of a graph stay in the order in which they were traced, whether they depend on each other or not."""

from __future__ import annotations

import torch
from torch import fx

from memcompile.lowering import operator
from memcompile.lowering.inductor.order_collectives import order_collectives

C10D = torch.ops._c10d_functional
STARTS = (C10D.all_reduce.default, C10D.all_gather_into_tensor.default)


def graph_of(dependent: bool) -> fx.Graph:
    """An all-gather and an all-reduce, of the all-gather's result or of another input."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    gathered = graph.call_function(STARTS[1], (x, 2, "group"))
    gathered = graph.call_function(C10D.wait_tensor.default, (gathered,))
    total = graph.call_function(torch.ops.aten.sum.default, (gathered,)) if dependent else y
    reduced = graph.call_function(STARTS[0], (total, "sum", "group"))
    reduced = graph.call_function(C10D.wait_tensor.default, (reduced,))
    graph.output((gathered, reduced))
    return graph


def test_what_depends_on_each_other_is_left_alone():
    graph = graph_of(dependent=True)
    before = len(graph.nodes)
    order_collectives(graph)
    assert len(graph.nodes) == before


def test_what_does_not_waits_for_what_came_before():
    graph = graph_of(dependent=False)
    order_collectives(graph)
    graph.lint()
    (ordered,) = graph.find_nodes(op="call_function", target=operator("in_order"))
    sent, after = ordered.args
    assert sent.name == "y" and after.target is C10D.wait_tensor.default and after.args[0].target is STARTS[1]
    (reduce,) = graph.find_nodes(op="call_function", target=STARTS[0])
    assert reduce.args[0] is ordered
    order_collectives(graph)
    assert len(graph.find_nodes(op="call_function", target=operator("in_order"))) == 1


def test_it_is_a_copy():
    x = torch.randn(3)
    copy = operator("in_order")(x, torch.zeros(()))
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    for tensor in (x, x.clone().requires_grad_()):
        torch.library.opcheck(operator("in_order"), (tensor, torch.zeros(())))
