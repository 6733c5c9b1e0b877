"""Captured graphs with `memory_lookup` in the place of their FFNs, or added to them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx, nn

from memcompile.common.sites import LAYER_NAME, VALUES_NAME, FfnSite, owner_path
from memcompile.common.sizes import resolve
from memcompile.config import MemoryConfig
from memcompile.errors import OptionError, PlanError
from memcompile.lowering import operator
from memcompile.lowering.parameters import LAYER_PARAMETERS, new_layer, new_values
from memcompile.passes.capture.graphs import Parameters, Scope, attribute_of, called_body, fake_mode, give_values, read
from memcompile.passes.capture.signature import Signature
from memcompile.passes.detect.blocks import Block, Candidate
from memcompile.passes.detect.detect import find_in_scopes
from memcompile.passes.fx import operator_name
from memcompile.passes.rewrite.splice import Splice


def rewrite(
    graph_module: fx.GraphModule,
    sites: Sequence[FfnSite],
    *,
    memory: MemoryConfig | None = None,
    parameters: Parameters | None = None,
) -> fx.GraphModule:
    """A captured graph with a memory for each of ``sites``: what :func:`memcompile.plan` makes of a live model.

    Where the weights are the module's own (torch.export), the new parameters are registered under the names that they
    have in a planned model, and those of replaced FFNs are gone. Where the weights are inputs (make_fx), so are the
    new ones: last in the dict that holds the FFNs' weights, or, without such a dict, after all other
    inputs of a graph that then takes them one by one. ``meta["memcompile"]`` of the result holds drawn values for the
    new inputs, by name and in their order.

    Drawn with one seed, the parameters are those of the planned model. A process that loads the result, exported or
    compiled ahead of time, has to import memcompile: it has the operators' kernels.

    Args:
        graph_module: a graph of ATen operators. It stays as it is; the result shares its other parameters.
        sites: which FFNs, of :func:`memcompile.find_ffns` for this graph or for the live model, whose names must then
            be the same.
        memory: the options; ``memory_layers`` is not read, because ``sites`` says which.
        parameters: as for :func:`memcompile.passes.find_in_graph`.

    Raises:
        OptionError: no sites, or ``parameters`` names an input that is not there.
        PlanError: a site that the graph does not have, has in another form or may not lose; a graph that has a memory.
    """
    requested = memory if memory is not None else MemoryConfig()
    _check(graph_module, sites)
    result = _copy(graph_module)
    scopes = read(result, parameters)
    blocks = _blocks(sites, scopes)
    drawn = _draw(blocks, requested, result, scopes[0])
    tensors = _TensorNodes(result, drawn, registered=not any(n.op == "placeholder" for n in scopes[0].parameters))
    for block in blocks:
        for call in block.calls:
            scope = next(s for s in scopes if s.capture is call.capture)
            _splice(call, scope, block.site, drawn, tensors)
    names = {name for block in blocks for name in block.site.parameters}
    _remove_parameters(names if drawn.config.placement == "replace" else set(), names, scopes, tensors)
    for scope in scopes:
        scope.module.graph.lint()
        scope.module.recompile()
    return result


def _check(graph_module: object, sites: Sequence[FfnSite]) -> None:
    if not isinstance(graph_module, fx.GraphModule):
        raise OptionError(
            f"rewrite() takes an fx.GraphModule, as ExportedProgram.module() returns one, "
            f"got {type(graph_module).__name__}"
        )
    if not sites or not all(isinstance(site, FfnSite) for site in sites):
        raise OptionError(f"sites must be a list of one or more of memcompile.find_ffns(graph_module), got {sites!r}")
    for site in sites:
        if site.refusal is not None:
            raise PlanError(f"{site.name or site.down!r} cannot become a memory: {site.refusal}")
    planned = [path for path, module in graph_module.named_modules() if hasattr(module, VALUES_NAME)]
    if planned:
        name = f"{planned[0]}.{VALUES_NAME}".lstrip(".")
        raise PlanError(f"the graph has an attribute {name!r} already: its model was planned before the capture")


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """Graphs and modules of its own, the parameters and buffers of ``module``."""
    result = fx.GraphModule(module, copy.deepcopy(module.graph), type(module).__name__)
    result.meta = dict(module.meta)
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and not _has(result, f"{path}.{name}".lstrip(".")):
                _register(result, f"{path}.{name}".lstrip("."), tensor)
        if owner._non_persistent_buffers_set:
            result.get_submodule(path)._non_persistent_buffers_set |= owner._non_persistent_buffers_set
    for node in result.graph.nodes:
        body = called_body(node, result)
        if body is not None:
            inner = attribute_of(result, str(body.target))
            assert isinstance(inner, fx.GraphModule)
            setattr(result, str(body.target), _copy(inner))
    give_values(result, result.graph)
    return result


def _has(module: nn.Module, name: str) -> bool:
    try:
        attribute_of(module, name)
    except AttributeError:
        return False
    return True


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def _blocks(sites: Sequence[FfnSite], scopes: list[Scope]) -> list[Block]:
    """The blocks of ``sites`` in execution order."""
    wanted = {site.down: site for site in sites}
    found = [block for block in find_in_scopes(scopes) if block.site.down in wanted]
    for block in found:
        site = wanted.pop(block.site.down)
        if block.site.refusal is not None:
            raise PlanError(f"{site.name or site.down!r} cannot become a memory in this graph: {block.site.refusal}")
        if set(block.site.parameters) != set(site.parameters):
            raise PlanError(
                f"{site.name or site.down!r} is not the same in this graph: it reads {sorted(block.site.parameters)} "
                f"here, and {sorted(site.parameters)} in the site given"
            )
    for site in wanted.values():
        readers = {operator_name(u) for n, name in scopes[0].parameters.items() if name == site.down for u in n.users}
        seen = f"{site.down} is read by {', '.join(sorted(readers))}" if readers else f"it has no {site.down}"
        raise PlanError(f"{site.name or site.down!r} is no feed-forward block of this graph: {seen}")
    return found


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """New parameters by their full names, and for each down-projection those of its lookup, in the operator's order."""

    config: MemoryConfig
    parameters: dict[str, nn.Parameter]
    operands: dict[str, list[str | None]]


def _draw(blocks: list[Block], requested: MemoryConfig, module: fx.GraphModule, scope: Scope) -> _Drawn:
    if requested.frozen:
        raise OptionError(
            f"values_storage={requested.values_storage!r} is of live models: plan the model so, and export it"
        )
    nodes = {name: node for node, name in scope.parameters.items()}
    downs = [nodes[block.site.down].meta["val"] for block in blocks]
    if len({down.device for down in downs}) > 1:
        raise PlanError(
            f"the blocks lie on different devices ({', '.join(sorted({str(down.device) for down in downs}))}), but "
            f"share one table of values: choose sites of one device"
        )
    weights = list(module.parameters()) or [n.meta["val"] for n in scope.capture.parameters]
    count = sum(weight.numel() for weight in weights)
    config = resolve(requested, [block.site for block in blocks], count)
    values = f"{_owner(blocks, nodes)}.{VALUES_NAME}".lstrip(".")
    parameters = {values: new_values(config, downs[0].dtype, downs[0].device)}
    operands: dict[str, list[str | None]] = {}
    holders = [block.site.down.rpartition(".")[0] for block in blocks]
    for block, holder, down in zip(blocks, holders, downs, strict=True):
        path = f"{holder}.{LAYER_NAME}".lstrip(".") if holders.count(holder) == 1 else f"{block.site.down}_{LAYER_NAME}"
        if _has(module, path):
            raise PlanError(f"the graph already has an attribute {path!r}: rename it")
        layer = new_layer(config, block.site.width, down.dtype, down.device)
        names = [None if layer[name] is None else f"{path}.{name}" for name in LAYER_PARAMETERS]
        parameters |= {f"{path}.{name}": p for name, p in layer.items() if p is not None}
        operands[block.site.down] = [*names[:3], values, *names[3:]]
    return _Drawn(config, parameters, operands)


def _owner(blocks: list[Block], parameters: Collection[str]) -> str:
    """Path of the module that holds the values in a planned model. A graph tells by the names of its parameters which
    modules are lists, whose parts are numbered.
    """

    def runs(path: str) -> bool:
        parts = {name.removeprefix(f"{path}.").partition(".")[0] for name in parameters if name.startswith(f"{path}.")}
        return bool(parts) and not any(map(str.isdigit, parts))

    return owner_path((block.site for block in blocks), runs)


class _TensorNodes:
    """The nodes that stand for new parameters, in each graph that reads them."""

    def __init__(self, module: fx.GraphModule, drawn: _Drawn, registered: bool) -> None:
        self.drawn, self.registered = drawn, registered
        self.mode = fake_mode([node.meta.get("val") for node in module.graph.nodes])
        self.nodes: dict[tuple[fx.Graph, str], fx.Node] = {}
        for name, parameter in drawn.parameters.items():
            if registered:
                _register(module, name, parameter)
                start = next(n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr"))
                with module.graph.inserting_before(start):
                    node = module.graph.get_attr(name)
            else:
                node = _append_placeholder(module.graph, name)
            self._add(module.graph, name, node)
        if not registered:
            module.meta["memcompile"] = dict(drawn.parameters)

    def node(self, scope: Scope, name: str) -> fx.Node:
        """The node in the scope's graph; a body of a higher-order operator gets one more operand."""
        graph = scope.module.graph
        if (graph, name) not in self.nodes:
            assert scope.caller is not None and scope.parent is not None
            scope.caller.args = (*scope.caller.args, self.node(scope.parent, name))
            self._add(graph, name, _append_placeholder(graph, name))
        return self.nodes[graph, name]

    def _add(self, graph: fx.Graph, name: str, node: fx.Node) -> None:
        parameter = self.drawn.parameters[name]
        node.meta["val"] = parameter if self.mode is None else self.mode.from_tensor(parameter, static_shapes=True)
        self.nodes[graph, name] = node


def _append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name.replace(".", "_"))
    node.target = node.name  # unique, and a name in Python
    return node


def _splice(call: Candidate, scope: Scope, site: FfnSite, drawn: _Drawn, tensors: _TensorNodes) -> None:
    names = drawn.operands[site.down]
    operands: list[Any] = [None if name is None else tensors.node(scope, name) for name in names]
    splice = Splice(call.region, scope, site)
    output = splice.insert(operator("memory_lookup"), operands, (drawn.config.heads, drawn.config.top_k))
    if drawn.config.placement == "add":
        splice.add(output)
    else:
        splice.replace(output)


def _remove_parameters(removed: set[str], ffns: set[str], scopes: list[Scope], tensors: _TensorNodes) -> None:
    """Takes the parameters of replaced FFNs out of the graphs and the module; nothing reads them any more."""
    for scope in reversed(scopes):
        nodes = [node for node, name in scope.parameters.items() if name in removed]
        graph = scope.module.graph
        for node in nodes:
            if node.users:
                readers = ", ".join(sorted(operator_name(user) for user in node.users))
                raise PlanError(f"{scope.parameters[node]} is also read by {readers}: its block cannot be replaced")
        if scope.caller is not None:
            assert scope.parent is not None
            first = scope.caller.args.index(called_body(scope.caller, scope.parent.module)) + 1
            gone = {first + i for i, p in enumerate(graph.find_nodes(op="placeholder")) if p in nodes}
            scope.caller.args = tuple(a for i, a in enumerate(scope.caller.args) if i not in gone)
        elif not tensors.registered:
            weights = [node for node, name in scope.parameters.items() if name in ffns]
            added = {name: tensors.nodes[graph, name] for name in tensors.drawn.parameters}
            Signature(graph, outside=list(added.values())).exchange(weights, nodes, added)
        for node in nodes:
            graph.erase_node(node)
        if scope.parent is None:
            _unregister(scope.module, removed)


def _unregister(module: nn.Module, names: set[str]) -> None:
    gone = {id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in names}
    for owner in module.modules():
        for name in [name for name, p in owner._parameters.items() if id(p) in gone]:
            del owner._parameters[name]
