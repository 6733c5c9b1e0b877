"""The pass over Inductor's graphs: sums of sparse gradients of one table are one operator."""

import pytest
import torch
from torch import Tensor, fx

from memcompile.lowering import operator
from memcompile.lowering.inductor.merge_scatters import merge_scatters
from tests.lowering.gather.test_weighted_gather import make, weighted_scatter

sparse_scatter = operator("sparse_scatter")
add = torch.ops.aten.add.Tensor


class Gradients:
    """A graph in which each layer has a scatter, and what it returns."""

    def __init__(self, layers: int) -> None:
        self.graph = fx.Graph()
        self.values = self.graph.placeholder("values")
        self.factors = [[self.graph.placeholder(f"{name}{i}") for name in "swg"] for i in range(layers)]
        data = [make(seed=i, tokens=3 + i) for i in range(layers)]
        self.inputs = (data[0].values, *(tensor for layer in data for tensor in layer[1:]))
        self.exact = [weighted_scatter(*layer[1:], 11) for layer in data]

    def scatters(self) -> list[fx.Node]:
        return [
            self.graph.call_function(sparse_scatter, (self.values, *([factor] for factor in layer)))
            for layer in self.factors
        ]

    def add(self, left: fx.Node, right: fx.Node) -> fx.Node:
        return self.graph.call_function(add, (left, right))

    def merged(self, *results: fx.Node) -> tuple[int, list[Tensor]]:
        """How many scatters are left, and what the graph then returns."""
        self.graph.output(list(results))
        merge_scatters(self.graph)
        self.graph.lint()
        found = fx.GraphModule({}, self.graph)(*self.inputs)
        assert all(tensor.is_sparse and tensor.is_coalesced() for tensor in found)
        assert not self.graph.find_nodes(op="call_function", target=add)
        nodes = self.graph.find_nodes(op="call_function", target=sparse_scatter)
        assert all(node.args[-1] is True for node in nodes), "Inductor must not see that it is sparse"
        return len(nodes), [tensor.to_dense() for tensor in found]


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("order", ["left", "right"])
def test_a_sum_becomes_one_operator(layers, order):
    gradients = Gradients(layers)
    total, *rest = gradients.scatters()
    for scatter in rest:
        total = gradients.add(total, scatter) if order == "left" else gradients.add(scatter, total)
    count, (found,) = gradients.merged(total)
    assert count == 1
    torch.testing.assert_close(found, sum(gradients.exact), rtol=1e-12, atol=1e-14)


def test_a_tree_of_sums():
    gradients = Gradients(4)
    a, b, c, d = gradients.scatters()
    count, (found,) = gradients.merged(gradients.add(gradients.add(a, b), gradients.add(c, d)))
    assert count == 1
    torch.testing.assert_close(found, sum(gradients.exact), rtol=1e-12, atol=1e-14)


def test_a_part_that_is_asked_for_itself_stays():
    gradients = Gradients(3)
    a, b, c = gradients.scatters()
    both = gradients.add(a, b)
    count, found = gradients.merged(a, both, gradients.add(both, c))
    assert count == 3
    exact = gradients.exact
    torch.testing.assert_close(found, [exact[0], exact[0] + exact[1], sum(exact)], rtol=1e-12, atol=1e-14)


def test_one_summand_twice():
    gradients = Gradients(1)
    (a,) = gradients.scatters()
    count, (found,) = gradients.merged(gradients.add(a, a))
    assert count == 1
    torch.testing.assert_close(found, 2 * gradients.exact[0], rtol=1e-12, atol=1e-14)


def test_other_sums_are_left_alone():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(add, (x, x)))
    before = str(graph)
    merge_scatters(graph)
    assert str(graph) == before
