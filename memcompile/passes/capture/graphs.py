"""Graphs that the user captured (torch.export, make_fx), in the form that the detector reads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from memcompile.common.token_wise import CASTS, TRANSPOSES
from memcompile.errors import OptionError, PlanError
from memcompile.passes._torch import (
    FakeTensor,
    FakeTensorMode,
    FakeTensorProp,
    HigherOrderOperator,
    OpOverload,
    PyTreeCodeGen,
    pytree,
)
from memcompile.passes.capture.trace import Capture
from memcompile.passes.fx import fake_value, operator_name, reach

Parameters = Mapping[str, str] | Sequence[str]

# Where operators read weights. A vector is one wherever it is read.
_WEIGHT_OPERANDS = {"linear": slice(1, 2), "addmm": slice(2, 3), "matmul": slice(1, 2), "mm": slice(1, 2)}
_WEIGHT_OPERANDS |= {"embedding": slice(0, 1)}
# Higher-order operators that call a body once, on the operands after it.
_WRAPPERS = frozenset({"wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "tag_activation_checkpoint"})
_UNBACKED = 11  # stands for a size that depends on data: small, and no model's width


@dataclasses.dataclass(frozen=True, eq=False)
class Scope:
    """One graph of a captured module: its own, or the body of a higher-order operator in it.

    Attributes:
        capture: a copy of the graph for the detector, every size in it a number.
        original: the graph's own node for each node of the copy.
        parameters: the nodes that stand for parameters, with the parameter's name.
        order: for each node of the copy, what sorts the nodes of all graphs in execution order.
        caller: the node that calls the body, which stands in ``parent``; None for the module's own graph.
    """

    module: fx.GraphModule
    capture: Capture
    original: dict[fx.Node, fx.Node]
    parameters: dict[fx.Node, str]
    order: dict[fx.Node, tuple[int, ...]]
    caller: fx.Node | None = None
    parent: Scope | None = None


def is_captured(module: nn.Module) -> bool:
    """Whether the module is a graph of operators and not of modules, which `torch.fx.symbolic_trace` leaves whole."""
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    return any(isinstance(node.target, OpOverload) for node in nodes)


def read(graph_module: fx.GraphModule, parameters: Parameters | None = None) -> list[Scope]:
    """The graphs of a captured module, each before the bodies that it calls. Changes nothing.

    Args:
        parameters: as for :func:`memcompile.passes.find_in_graph`.

    Raises:
        OptionError: ``parameters`` names an input that is not there.
        PlanError: the graph is not of ATen operators, or does not say which shapes it has.
    """
    captured = is_captured(graph_module)
    for node in graph_module.graph.nodes:
        guards = node.op == "call_module" and not node.users  # how torch.export checks its inputs
        if not captured or node.op == "call_method" or (node.op == "call_module" and not guards):
            raise PlanError(
                f"the graph is not of ATen operators ({node.op} {node.target}), as those of Dynamo and symbolic_trace: "
                f"capture it with torch.export.export(model, args).module() or make_fx(graph_module)(*inputs)"
            )
    return list(_scopes(graph_module, _parameters(graph_module, parameters), None, None))


def _scopes(
    module: fx.GraphModule,
    parameters: dict[fx.Node, str],
    caller: fx.Node | None,
    parent: Scope | None,
    start: tuple[int, ...] = (),
) -> Iterator[Scope]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    order = {copy: (*start, index) for index, copy in enumerate(copies.values())}
    bodies = {node: called for node in module.graph.nodes if (called := called_body(node, module)) is not None}
    for node in bodies:  # parameters are read in the body, not by its call
        copies[node].args = tuple(a for a in copies[node].args if a not in {copies[n] for n in parameters})
    buffers = [n for n in module.graph.find_nodes(op="get_attr") if n not in parameters]
    give_values(module, graph)
    _give_sizes(graph)
    for node in reversed(graph.nodes):  # autograd's, where the weights required gradients
        if operator_name(node) == "detach" and not node.users:
            graph.erase_node(node)
    capture = Capture(
        "", graph, {copies[n]: name for n, name in parameters.items()}, frozenset(copies[n] for n in buffers)
    )
    scope = Scope(module, capture, {copy: node for node, copy in copies.items()}, parameters, order, caller, parent)
    yield scope
    for node, (body, inner) in bodies.items():
        if len(body.users) == 1:
            operands = node.args[node.args.index(body) + 1 :]
            placeholders = inner.graph.find_nodes(op="placeholder")
            passed = {p: parameters[o] for p, o in zip(placeholders, operands, strict=True) if o in parameters}
            yield from _scopes(inner, passed, node, scope, order[copies[node]])


def called_body(node: fx.Node, module: fx.GraphModule) -> tuple[fx.Node, fx.GraphModule] | None:
    """The body that a higher-order operator calls, and the ``get_attr`` node that gives it."""
    if isinstance(node.target, HigherOrderOperator) and str(node.target) in _WRAPPERS:
        for attribute in (a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"):
            body = attrgetter(str(attribute.target))(module)
            if isinstance(body, fx.GraphModule):
                return attribute, body
    return None


def _parameters(graph_module: fx.GraphModule, given: Parameters | None) -> dict[fx.Node, str]:
    """Which nodes stand for parameters. Tied names are represented by the module's first."""
    found: dict[fx.Node, str] = {}
    first = {id(parameter): name for name, parameter in graph_module.named_parameters()}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = attrgetter(str(node.target))(graph_module)
        if isinstance(value, nn.Parameter):
            found[node] = first[id(value)]
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if given is None:
        return found or _weights(graph_module, placeholders)
    names = dict(given) if isinstance(given, Mapping) else {name: name for name in given}
    by_target = {str(node.target): node for node in placeholders}
    for target, name in names.items():
        if target not in by_target:
            raise OptionError(f"parameters names {target!r}, which is no input of the graph: {list(by_target)}")
        found[by_target[target]] = name
    return found


def _weights(graph_module: fx.GraphModule, placeholders: list[fx.Node]) -> dict[fx.Node, str]:
    """The inputs that are read as weights, and whatever else is passed in one dict with them, by its keys there."""
    weights = {node for node in placeholders if _is_weight(node)}
    holders = [d for d in _dicts(_structure_of(graph_module.graph)) if not weights.isdisjoint(d.values())]
    keys = {value: key for holder in holders for key, value in holder.items()}
    if weights and weights <= keys.keys() and len(set(keys.values())) == len(keys):
        return {node: name for node, name in keys.items() if fake_value(node) is not None}
    return {node: str(node.target) for node in placeholders if node in weights}


def _is_weight(placeholder: fx.Node) -> bool:
    value = fake_value(placeholder)
    if value is None or not value.is_floating_point():
        return False
    if value.dim() == 1:
        return True
    forms = reach([placeholder], lambda node: [u for u in node.users if operator_name(u) in CASTS | TRANSPOSES])
    readers = ((form, user) for form in forms for user in form.users)
    return any(form in user.args[_WEIGHT_OPERANDS.get(operator_name(user), slice(0))] for form, user in readers)


def give_values(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Runs ``graph`` of ``module`` on fake tensors where another pass left nodes without a value.

    Raises:
        PlanError: the inputs have none either.
    """
    inputs = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    mode = fake_mode(inputs)
    for node in graph.find_nodes(op="get_attr"):
        value = attrgetter(str(node.target))(module)
        if isinstance(value, Tensor) and "val" not in node.meta:
            node.meta["val"] = value if mode is None else mode.from_tensor(value, static_shapes=True)
    if all("val" in node.meta for node in graph.nodes if node.op == "call_function"):
        return
    if mode is None:
        raise PlanError(
            "the graph does not say which shapes its inputs have (meta['val']): capture it with torch.export or "
            "make_fx, or run FakeTensorProp(graph_module).propagate(*inputs) first"
        )
    with mode:  # one for all
        others = {at: v for at, v in enumerate(inputs) if isinstance(v, FakeTensor) and v.fake_mode is not mode}
        for at, v in others.items():
            inputs[at] = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
    owner = module if module.graph is graph else fx.GraphModule(module, graph)
    FakeTensorProp(owner, mode).propagate_dont_convert_inputs(*inputs)


def fake_mode(values: Sequence[Any]) -> FakeTensorMode | None:
    """The mode of the first fake tensor; ``make_fx`` on real inputs leaves each in one of its own."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def _give_sizes(graph: fx.Graph) -> None:
    """Replaces each symbolic size by the size that the graph was captured with: a comparison of symbolic sizes would
    be recorded as a guard on the captured program.
    """
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            numbers[node] = _number(value)
        elif isinstance(value, Tensor) and not all(type(size) is int for size in value.shape):
            node.meta["val"] = value.new_empty([_number(s) for s in value.shape], device="meta")
    for node in graph.nodes:
        if node.op == "call_function" and node not in numbers:
            arguments: Any = fx.map_arg((node.args, node.kwargs), lambda n: numbers.get(n, n))  # type: ignore[arg-type,return-value]
            node.args, node.kwargs = arguments
    for node in reversed(numbers):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _number(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    unbacked = expression.subs(dict.fromkeys(expression.free_symbols, _UNBACKED))
    return int(unbacked if size.node.hint is None else size.node.hint)


def _structure_of(graph: fx.Graph, outside: Collection[fx.Node] = ()) -> Any:
    """The structure that a graph's placeholders are passed in: ``f(params, x)`` with a dict of weights has one, a graph
    that takes its placeholders one by one has none. Those ``outside`` are not taken yet.
    """
    codegen, placeholders = graph._codegen, [n for n in graph.find_nodes(op="placeholder") if n not in outside]
    if isinstance(codegen, PyTreeCodeGen) and codegen.pytree_info.in_spec.num_leaves == len(placeholders):
        return pytree.tree_unflatten(placeholders, codegen.pytree_info.in_spec)
    return None


def exchange(
    together: Sequence[fx.Node], removed: Sequence[fx.Node], added: Mapping[str, fx.Node], graph: fx.Graph
) -> None:
    """Has a graph no longer take ``removed``, and take ``added``, its last placeholders, by name in the dict that holds
    ``together``. Without one such dict the graph takes its placeholders one by one.
    """
    structure = _structure_of(graph, outside=added.values())
    holder = next((d for d in _dicts(structure) if set(together) <= set(d.values())), None)
    if holder is None:
        graph.set_codegen(fx.graph.CodeGen())
        return
    for key in [key for key, value in holder.items() if value in removed]:
        del holder[key]
    holder.update(added)
    leaves, spec = pytree.tree_flatten(structure)
    for node, following in itertools.pairwise(leaves):
        node.append(following)  # placeholders stand in the order of the leaves
    assert isinstance(graph._codegen, PyTreeCodeGen)
    graph.set_codegen(PyTreeCodeGen(graph._codegen.pytree_info._replace(in_spec=spec)))


def _dicts(structure: Any) -> list[dict[str, Any]]:
    """Every dict from names to placeholders in the structure, outer ones first."""
    if isinstance(structure, dict):
        if all(isinstance(k, str) and isinstance(v, fx.Node) for k, v in structure.items()):
            return [structure]
        structure = list(structure.values())
    return [d for value in structure for d in _dicts(value)] if isinstance(structure, (list, tuple)) else []
