"""Normalized graphs: mutation and metadata operands read like plain dataflow, and the numbers stay the same."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile.passes.capture.normalize import normalize
from memcompile.passes.fx import features, is_in_place, operator_name, tokens


def traced(function, *inputs):
    return make_fx(function, pre_dispatch=True)(*inputs)


def names(graph):
    return [operator_name(node) for node in graph.nodes if node.op == "call_function"]


def returned(graph):
    (output,) = graph.find_nodes(op="output")
    return output.args[0]


def relu_then_scale(x):
    y = x * 1
    y.relu_()
    y.mul_(0.5)
    return y + 1


def mutated_after_read(x):
    y = x * 1
    z = y + 1
    y.mul_(2)
    return y * z


def twice(x):
    y = x * 1
    return y.add_(1).add_(2) + y


@pytest.mark.parametrize("function", [relu_then_scale, mutated_after_read, twice])
def test_mutations_become_dataflow(function):
    x = torch.randn(3, 5)
    module = traced(function, x)
    normalize(module.graph)
    module.recompile()
    for node in module.graph.nodes:
        if is_in_place(node):
            later = [user for user in node.args[0].users if user is not node and node < user]
            assert not later, f"{later} read {node.args[0]} behind {node}"
    assert torch.equal(module(x), function(x))


def test_what_read_before_the_mutation_keeps_the_old_value():
    module = traced(mutated_after_read, torch.randn(3, 5))
    normalize(module.graph)
    product = returned(module.graph)
    written, read_before = product.args
    assert operator_name(written) == "mul" and is_in_place(written)
    assert read_before.args[0] is written.args[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, like: (x + 1).type_as(like), "to"),
        (lambda x, like: x.view_as(like), "view"),
        (lambda x, like: x.reshape_as(like), "reshape"),
        (lambda x, like: x.expand_as(like), "expand"),
    ],
)
def test_operands_that_give_only_a_shape_or_dtype_are_dropped(function, expected):
    x, like = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64)
    module = traced(function, x, like)
    normalize(module.graph)
    module.recompile()
    node = returned(module.graph)
    _, like_node = module.graph.find_nodes(op="placeholder")
    assert operator_name(node) == expected
    assert not like_node.users
    assert torch.equal(module(x, like), function(x, like))


def test_dead_views_go_and_other_dead_code_stays():
    """A dead result may live on outside of the graph: kept on a module, or by a hook."""

    def function(x):
        x.view(-1).chunk(2)
        x.exp()
        x.detach()
        return x + 1

    module = traced(function, torch.ones(4))
    normalize(module.graph)
    assert names(module.graph) == ["exp", "detach", "add"]


def test_names_and_sizes_of_nodes():
    module = traced(lambda x: (x.mul_(2).true_divide(3).flatten(0, 1), x.sum()), torch.ones(2, 3, 5))
    flat, total = returned(module.graph)
    assert [operator_name(n) for n in (flat.args[0].args[0], flat.args[0], flat)][:1] == ["mul"]
    assert (features(flat), tokens(flat)) == (5, 6)
    assert (features(total), tokens(total)) == (1, 1)
    (output,) = module.graph.find_nodes(op="output")
    assert (operator_name(output), features(output), tokens(output)) == ("output", 0, 0)


def test_a_module_with_ignored_results_of_in_place_operators():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 4)

        def forward(self, x):
            h = self.up(x)
            torch.relu_(h)
            h.mul_(0.5)
            return self.down(h)

    module = traced(InPlace(), torch.randn(3, 4))
    normalize(module.graph)
    linears = [n for n in module.graph.nodes if operator_name(n) == "linear"]
    chain, node = [], linears[1].args[0]
    while node is not linears[0]:
        chain.append(operator_name(node))
        node = node.args[0]
    assert chain == ["mul", "relu"]
