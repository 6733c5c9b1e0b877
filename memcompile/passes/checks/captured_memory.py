"""A captured graph of a planned model runs the memory exactly as planned, or is refused."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

from memcompile.errors import CaptureError
from memcompile.lowering.memory_lookup import DEFAULTS
from memcompile.passes._torch import FakeTensor, pytree
from memcompile.passes.fx import calls_a_body

OP_NAME = "memcompile.memory_lookup"
_UPDATING = f"{OP_NAME}.updating"
_COUNTING = f"{OP_NAME}.counting"
_OVERLOADS = {OP_NAME, f"{OP_NAME}.default", _UPDATING, _COUNTING}
POSITIONS = {name: position for position, name in enumerate(DEFAULTS)}


def verify_captured_memory(
    graph_module: fx.GraphModule,
    inputs: Sequence[object],
    layers: Mapping[str, Sequence[torch.Tensor]],
    calls: Mapping[str, int] | None,
) -> collections.Counter[str]:
    """Checks one captured graph; returns how often each layer's lookup stands in it.

    Args:
        graph_module: a graph captured by Dynamo, whose placeholders have the values ``inputs``.
        layers: name of each memory layer -> its parameters.
        calls: how often each layer runs in one forward, where the graph holds the whole forward; None for a part.

    Raises:
        CaptureError: a lookup that is no layer's, or a layer that does not run as often as planned.
    """
    owner = names_by_identity(layers, inputs)
    found: collections.Counter[str] = collections.Counter()
    for node, binding in operators_in(graph_module, inputs):
        read = {owner[id(v)] for v in (binding.get(a) for a in node.all_input_nodes) if id(v) in owner}
        if is_lookup(node):
            if len(read) != 1:
                raise CaptureError(
                    f"memcompile: {node.name} reads the parameters of {len(read)} memory layers, not of one"
                )
            found.update(read)
    if calls is not None and found != collections.Counter(calls):
        raise CaptureError(
            f"memcompile: planned {dict(calls)} lookups, captured {dict(found)}: the forward took another path "
            f"than when it was planned; plan it with example_inputs of the kind that it runs on"
        )
    return found


def make_dense_where_read(
    graph_module: fx.GraphModule, inputs: Sequence[object], values: Sequence[torch.Tensor]
) -> int:
    """Gives all lookups of a captured graph a dense gradient, in place, where something else reads the values of the
    pools whose layers it may run: autograd would add a sparse gradient to that of a penalty on the table, which is
    dense, and cannot trace it. Returns how many lookups have got one.
    """
    tables = names_by_identity({"values": values}, inputs)
    operators = [(node, binding) for node, binding in operators_in(graph_module, inputs) if not calls_a_body(node)]
    others = ((node, binding) for node, binding in operators if not is_lookup(node))
    if not any(id(binding.get(a)) in tables for node, binding in others for a in node.all_input_nodes):
        return 0
    lookups = [node for node, _ in operators if is_lookup(node)]
    for node in lookups:
        node.update_arg(POSITIONS["values_grad"], "dense")
    return len(lookups)


def names_by_identity(layers: Mapping[str, Sequence[torch.Tensor]], inputs: Sequence[object]) -> dict[int, str]:
    """The name that each parameter has in `layers`, by the parameter's identity.

    DDPOptimizer compiles the parts of a graph with fake inputs. A fake mode makes one fake tensor of each real one,
    so a parameter is also known by that.
    """
    fake = next((value for value in inputs if isinstance(value, FakeTensor)), None)
    owner = {}
    for name, parameters in layers.items():
        for parameter in parameters:
            owner[id(parameter)] = name
            if fake is not None:
                owner[id(fake.fake_mode.from_tensor(parameter))] = name
    return owner


def is_lookup(node: fx.Node) -> bool:
    """Whether the node is one call of the op."""
    return node.op == "call_function" and str(node.target) in _OVERLOADS


def is_updating(node: fx.Node) -> bool:
    """Whether a lookup takes the statistics of its tokens, in training."""
    counting = str(node.target) == _COUNTING
    return str(node.target) == _UPDATING or (counting and bool(node.args[POSITIONS["training"]]))


def operators_in(
    graph_module: fx.GraphModule, inputs: Sequence[object]
) -> Iterator[tuple[fx.Node, dict[fx.Node, object]]]:
    """Every operator of a graph and of the bodies that it calls, with the values of the placeholders that it sees."""
    binding = dict(zip(placeholders_of(graph_module), inputs, strict=False))
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and "." not in str(node.target):
            binding[node] = getattr(graph_module, str(node.target), None)
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        name = node.target if node.op == "call_method" else getattr(node.target, "__qualname__", "")
        if "to_local" in name:  # of a DTensor: what a rank has of a parameter stands for it (until 2.11 a function)
            binding[node] = binding.get(node.all_input_nodes[0])
            continue
        yield node, binding
        for body in (binding.get(a) for a in node.all_input_nodes):
            if not isinstance(body, fx.GraphModule):
                continue
            # In order, repeats included; what stands before a body's own operands (a predicate) is no input of it.
            given = [binding.get(a) if isinstance(a, fx.Node) else a for a in pytree.tree_leaves(node.args)]
            operands = [value for value in given if not isinstance(value, fx.GraphModule)]
            first = max(0, len(operands) - len(placeholders_of(body)))
            yield from operators_in(body, operands[first:])


def placeholders_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    return graph_module.graph.find_nodes(op="placeholder")
