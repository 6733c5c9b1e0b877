"""A captured graph that does not run the planned memory, and nothing else with it, is an error."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import CaptureError
from memcompile.passes.checks.captured_memory import (
    POSITIONS,
    is_lookup,
    operators_in,
    placeholders_of,
    verify_captured_memory,
)
from memcompile.runtime.pool import pool_of
from tests.models import ZOO, tiny_gpt
from tests.planned import batch, planned_gpt, stop_before_inductor

MEMORY = {"n_keys": 8, "top_k": 4, "heads": 2}


class Captured:
    """The graph of a planned model of four blocks, two of them memory, with what verify needs to know of it."""

    def __init__(self, model=None, function=None):
        self.model = model if model is not None else tiny_gpt()
        memcompile.plan(self.model, memory_layers=2, **MEMORY)
        pool = pool_of(self.model)
        self.parameters = {name: dict(layer.named_parameters()) for name, layer in pool.layers.items()}
        self.layers = {name: list(layer.values()) for name, layer in self.parameters.items()}
        self.calls = {site.down.removeprefix(pool.prefix): site.calls for site in pool.chosen}
        self.graphs = []
        torch.compile(function or self.model, backend=self.keep, fullgraph=True)(torch.randint(50, (3, 5)))
        ((self.module, self.inputs),) = self.graphs

    def keep(self, module, inputs):
        self.graphs.append((module, list(inputs)))
        return module.forward

    def lookups(self):
        return [node for node in self.module.graph.nodes if is_lookup(node)]

    def placeholder(self, value):
        placeholders = self.module.graph.find_nodes(op="placeholder")
        return next(p for p, v in zip(placeholders, self.inputs, strict=True) if v is value)

    def verify(self):
        return verify_captured_memory(self.module, self.inputs, self.layers, self.calls)


@pytest.fixture(scope="module")
def captured_once():
    return Captured()


@pytest.fixture
def captured(captured_once):
    """With a graph to change."""
    captured = copy.copy(captured_once)
    captured.module = copy.deepcopy(captured_once.module)
    return captured


def test_the_planned_graph_passes(captured):
    assert captured.verify() == {"blocks.1.ffn.2.weight": 1, "blocks.3.ffn.2.weight": 1}
    assert len(captured.lookups()) == 2


def test_a_part_of_the_graph_passes_without_calls(captured):
    _, second = captured.lookups()
    second.replace_all_uses_with(second.args[0])
    captured.module.graph.erase_node(second)
    assert verify_captured_memory(captured.module, captured.inputs, captured.layers, None) == {
        "blocks.1.ffn.2.weight": 1
    }


def test_a_missing_lookup(captured):
    lookup = captured.lookups()[0]
    lookup.replace_all_uses_with(lookup.args[0])
    captured.module.graph.erase_node(lookup)
    with pytest.raises(CaptureError, match=r"planned \{'blocks.1.ffn.2.weight': 1.*plan it with example_inputs"):
        captured.verify()


def test_a_lookup_too_many(captured):
    lookup = captured.lookups()[0]
    with captured.module.graph.inserting_after(lookup):
        again = captured.module.graph.node_copy(lookup)
    lookup.replace_all_uses_with(again)
    with pytest.raises(CaptureError, match=r"captured \{'blocks.1.ffn.2.weight': 2"):
        captured.verify()


def test_layers_exchanged(captured):
    """The first block reads the half-keys of the second."""
    first, second = captured.parameters.values()
    lookup = captured.lookups()[0]
    lookup.replace_input_with(captured.placeholder(first["half_keys"]), captured.placeholder(second["half_keys"]))
    with pytest.raises(CaptureError, match="reads the parameters of 2 memory layers, not of one"):
        captured.verify()


def test_a_lookup_of_no_layer(captured):
    lookup = captured.lookups()[0]
    (x,) = [n for n in lookup.all_input_nodes if n.op != "placeholder"]
    for node in lookup.all_input_nodes:
        if node.op == "placeholder":
            lookup.replace_input_with(node, x)
    with pytest.raises(CaptureError, match="reads the parameters of 0 memory layers"):
        captured.verify()


@pytest.mark.parametrize("name", ["query_weight", "half_keys", "gate_weight", "out_bias"])
def test_others_may_read_what_a_layer_reads(captured, name):
    """Penalties and norms do, and optimizers whose step is compiled."""
    layer = captured.parameters["blocks.1.ffn.2.weight"]
    placeholder = captured.placeholder(layer[name])
    found = captured.verify()
    with captured.module.graph.inserting_before(captured.lookups()[0]):
        captured.module.graph.call_function(torch.sum, (placeholder,))
    assert captured.verify() == found


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gpt = tiny_gpt()

    def forward(self, tokens):
        x = self.gpt.tokens(tokens)
        for block in self.gpt.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.gpt.head(x)


def test_bodies_of_higher_order_operators_are_looked_into():
    captured = Captured(Checkpointed())
    assert not captured.lookups()
    assert captured.verify() == {"blocks.1.ffn.2.weight": 1, "blocks.3.ffn.2.weight": 1}
    bodies = [m for m in captured.module.modules() if isinstance(m, torch.fx.GraphModule) and m is not captured.module]
    for body in bodies:
        for node in [n for n in body.graph.nodes if is_lookup(n)]:
            node.replace_all_uses_with(node.args[0])
            body.graph.erase_node(node)
    with pytest.raises(CaptureError, match=r"captured \{\}"):
        captured.verify()


def test_calls_of_a_shared_layer_are_counted():
    model, _ = ZOO["shared"]()
    memcompile.plan(model, memory_layers=1, **MEMORY)
    pool = pool_of(model)
    graphs = []
    torch.compile(model, backend=lambda m, i: graphs.append((m, i)) or m.forward)(torch.randint(50, (3, 5)))
    ((module, inputs),) = graphs
    layers = {name: list(layer.parameters()) for name, layer in pool.layers.items()}
    assert verify_captured_memory(module, inputs, layers, {"blocks.0.ffn.2.weight": 4}) == {"blocks.0.ffn.2.weight": 4}
    with pytest.raises(CaptureError, match="planned"):
        verify_captured_memory(module, inputs, layers, {"blocks.0.ffn.2.weight": 3})


@pytest.mark.parametrize("before", [(), ("predicate",)], ids=["all are its own", "a predicate stands before them"])
def test_operands_of_a_body_stand_for_its_placeholders(before):
    """In order, one twice, for an operator that calls its body."""
    body = fx.symbolic_trace(lambda first, second, third: torch.add(first, second) * third)
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in ("predicate", "a", "b")}
    operands = [given[name] for name in ("a", "b", "a")]
    graph.output(graph.call_function(torch.cond, (*map(given.get, before), graph.get_attr("body"), operands)))
    outer = fx.GraphModule({"body": body}, graph)

    _, (add, binding), _ = operators_in(outer, list(given))
    assert [binding[a] for a in placeholders_of(body)] == ["a", "b", "a"]
    assert add.target is torch.add


# --- values that something else reads too: their gradient is dense, and what it should be ---------

PLAN = {"layers": 2, "memory_layers": 2, "n_keys": 32, "values_grad": "sparse"}
BATCH = batch()


def plain(model):
    return model(*BATCH)


def penalised(model):
    return model(*BATCH) + model.memory_values.pow(2).mean()


def checkpointed_and_penalised(model):
    return checkpoint(model, *BATCH, use_reentrant=False) + model.memory_values.abs().mean()


@pytest.mark.parametrize(("loss", "layout"), [(plain, torch.sparse_coo), (penalised, torch.strided)])
def test_the_gradient_is_sparse_unless_something_else_reads_the_values(loss, layout, monkeypatch):
    stop_before_inductor(monkeypatch, lambda graph, inputs: graph.forward)
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
