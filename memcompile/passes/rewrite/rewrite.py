"""Captured graphs with `memory_lookup` in the place of their FFNs, or added to them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import Any

from torch import fx, nn

from memcompile.common.sites import LAYER_NAME, VALUES_NAME, FfnSite, owner_path
from memcompile.common.sizes import resolve
from memcompile.config import MemoryConfig
from memcompile.errors import OptionError, PlanError
from memcompile.lowering import operator
from memcompile.lowering.memory_lookup import DEFAULTS
from memcompile.lowering.parameters import LAYER_PARAMETERS, lookup_options, new_layer, new_values
from memcompile.passes._torch import assign_attribute
from memcompile.passes.capture.graphs import Parameters, Scope, called_body, exchange, fake_mode, give_values, read
from memcompile.passes.detect.blocks import Block, Candidate
from memcompile.passes.detect.detect import find_in_scopes
from memcompile.passes.fx import calls_a_body, operator_name
from memcompile.passes.rewrite.splice import Splice

# The operator's tensors before its sizes.
_POSITIONAL = tuple(itertools.takewhile(lambda name: name != "heads", DEFAULTS))


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
    new ones: last in the dict that holds the FFNs' weights, or, without such a dict, after all other inputs of a graph
    that then takes them one by one. ``meta["memcompile"]`` of the result holds drawn values for them, by name and in
    their order. Drawn with one seed, the parameters are those of the planned model.

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
    config = memory if memory is not None else MemoryConfig()
    _check(graph_module, sites, config)
    result = _copy(graph_module)
    scopes = read(result, parameters)
    blocks = _blocks(sites, scopes)
    added = _NewParameters(result, scopes[0], blocks, config)
    splices = [_splice(call, scopes, block.site, added) for block in blocks for call in block.calls]
    ffns = {name for block in blocks for name in block.site.parameters}
    replaced = ffns if config.placement == "replace" else set()
    if replaced:
        _erase(splices, scopes)
    _remove_parameters(replaced, ffns, scopes, added)
    for scope in scopes:
        scope.module.graph.lint()
        scope.module.recompile()
    return result


def _check(graph_module: object, sites: Sequence[FfnSite], config: MemoryConfig) -> None:
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
    if config.has_batch_norm:
        raise OptionError(
            f"query_norm='batch', which variant={config.variant!r} has here, differs in train and eval mode, and a "
            f"captured graph has one mode: plan the live model so, and export it"
        )
    if config.balance_loss:
        raise OptionError(
            f"balance_loss={config.balance_loss:g} is of train mode, and a captured graph has one mode: for inference "
            f"give memory=dataclasses.replace(config, balance_loss=0); to train, plan the live model so, and export it"
        )
    if config.frozen:
        raise OptionError(
            f"values_storage={config.values_storage!r} is of live models: plan the model so, and export it"
        )


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """Graphs and modules of its own, the parameters and buffers of ``module``."""
    result = fx.GraphModule(module, copy.deepcopy(module.graph), type(module).__name__)
    result.meta = dict(module.meta)
    buffers = module.named_buffers(remove_duplicate=False)
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *buffers):
        if not _has(result, name):
            assign_attribute(tensor, result, name)
    for path, owner in module.named_modules(remove_duplicate=False):
        if owner._non_persistent_buffers_set:
            result.get_submodule(path)._non_persistent_buffers_set |= owner._non_persistent_buffers_set
    for node in result.graph.nodes:
        if (called := called_body(node, result)) is not None:
            body, inner = called
            setattr(result, str(body.target), _copy(inner))
    give_values(result, result.graph)
    return result


def _has(module: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


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


def _owner(blocks: list[Block], parameters: Collection[str]) -> str:
    """Path of the module that holds the values in a planned model. A graph tells by the names of its parameters which
    modules are lists, whose parts are numbered.
    """

    def runs(path: str) -> bool:
        parts = {name.removeprefix(f"{path}.").partition(".")[0] for name in parameters if name.startswith(f"{path}.")}
        return bool(parts) and not any(map(str.isdigit, parts))

    return owner_path((block.site for block in blocks), runs)


class _NewParameters:
    """The parameters of the memory, drawn; and the nodes that stand for them in each graph that reads them.

    Attributes:
        config: the options with their sizes.
        drawn: the parameters by their full names, in the order in which they are drawn.
        registered: whether they are the module's own, and not inputs of its graph.
    """

    def __init__(self, module: fx.GraphModule, scope: Scope, blocks: list[Block], requested: MemoryConfig) -> None:
        nodes = {name: node for node, name in scope.parameters.items()}
        downs = {block.site.down: nodes[block.site.down].meta["val"] for block in blocks}
        first, *others = downs.values()
        if any(other.device != first.device for other in others):
            raise PlanError(
                f"the blocks lie on different devices ({', '.join(sorted({str(d.device) for d in downs.values()}))}), "
                f"but share one table of values: choose sites of one device"
            )
        weights = list(module.parameters()) or [n.meta["val"] for n in scope.capture.parameters]
        self.config = resolve(requested, [block.site for block in blocks], sum(weight.numel() for weight in weights))
        self._values = f"{_owner(blocks, nodes)}.{VALUES_NAME}".lstrip(".")
        width = max(block.site.width for block in blocks)
        self.drawn = {self._values: new_values(self.config, width, first.dtype, first.device)}
        self._paths: dict[str, str] = {}  # of the layers, by the down-projections
        holders = [down.rpartition(".")[0] for down in downs]
        for block, holder, (weight, down) in zip(blocks, holders, downs.items(), strict=True):
            path = f"{holder}.{LAYER_NAME}".lstrip(".") if holders.count(holder) == 1 else f"{weight}_{LAYER_NAME}"
            if _has(module, path):
                raise PlanError(f"the graph already has an attribute {path!r}: rename it")
            layer = new_layer(self.config, block.site.width, down.dtype, down.device)
            self.drawn |= {f"{path}.{name}": p for name, p in layer.items() if p is not None}
            self._paths[weight] = path
        self.registered = not any(node.op == "placeholder" for node in scope.parameters)
        self._nodes: dict[tuple[fx.Graph, str], fx.Node] = {}
        self._mode = fake_mode([node.meta.get("val") for node in module.graph.nodes])
        for name, parameter in self.drawn.items():
            if self.registered:
                assign_attribute(parameter, module, name)
                start = next(n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr"))
                with module.graph.inserting_before(start):
                    self._add(module.graph.get_attr(name), name)
            else:
                self._add(_append_placeholder(module.graph, name), name)
        if not self.registered:
            module.meta["memcompile"] = dict(self.drawn)

    def operands(self, site: FfnSite, scope: Scope) -> list[fx.Node | None]:
        """The nodes of one layer in the scope's graph, in the order of the operator's arguments."""
        names = [f"{self._paths[site.down]}.{name}" for name in LAYER_PARAMETERS if name in _POSITIONAL]
        return [self.node(scope, n) if n in self.drawn else None for n in (*names[:3], self._values, *names[3:])]

    def options(self, site: FfnSite) -> dict[str, Any]:
        """The operator's other arguments for one layer, but for those that have their defaults."""
        found = lookup_options(self.config, [*self._paths].index(site.down))
        return {name: value for name, value in found.items() if value != DEFAULTS[name]}

    def node(self, scope: Scope, name: str) -> fx.Node:
        """The node in the scope's graph; a body of a higher-order operator gets one more operand."""
        graph = scope.module.graph
        if (graph, name) not in self._nodes:
            assert scope.caller is not None and scope.parent is not None
            scope.caller.args = (*scope.caller.args, self.node(scope.parent, name))
            self._add(_append_placeholder(graph, name), name)
        return self._nodes[graph, name]

    def _add(self, node: fx.Node, name: str) -> None:
        parameter = self.drawn[name]
        node.meta["val"] = parameter if self._mode is None else self._mode.from_tensor(parameter, static_shapes=True)
        self._nodes[node.graph, name] = node


def _append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name.replace(".", "_"))
    node.target = node.name  # unique, and a name in Python
    return node


def _splice(call: Candidate, scopes: list[Scope], site: FfnSite, added: _NewParameters) -> Splice:
    scope = next(scope for scope in scopes if scope.capture is call.capture)
    splice = Splice(call.region, scope, site)
    options = added.options(site)
    sizes = options.pop("heads"), options.pop("top_k")
    output = splice.insert(operator("memory_lookup"), added.operands(site, scope), sizes, options)
    if added.config.placement == "add":
        splice.add(output)
    else:
        splice.replace(output)
    return splice


def _erase(splices: list[Splice], scopes: list[Scope]) -> None:
    """Takes replaced FFNs out of the graphs, their in-place and random operators too."""
    inner = set[fx.Node]().union(*(splice.inner for splice in splices))

    def stays(node: fx.Node) -> bool:
        calls = node.op == "call_module" or calls_a_body(node)  # which may change a buffer
        return node not in inner and (calls or node.is_impure())

    for graph in (scope.module.graph for scope in scopes):
        if not inner.isdisjoint(graph.nodes):
            graph.eliminate_dead_code(stays)
    for splice in splices:
        splice.check_erased()


def _remove_parameters(removed: set[str], ffns: set[str], scopes: list[Scope], added: _NewParameters) -> None:
    """Takes the parameters of replaced FFNs out of the graphs and the module; nothing reads them any more."""
    for scope in reversed(scopes):
        nodes = [node for node, name in scope.parameters.items() if name in removed]
        graph = scope.module.graph
        for node in nodes:
            if node.users:
                readers = ", ".join(sorted(operator_name(user) for user in node.users))
                raise PlanError(f"{scope.parameters[node]} is also read by {readers}: its block cannot be replaced")
        if scope.caller is not None:
            placeholders = graph.find_nodes(op="placeholder")  # which the caller's last arguments are for
            first = len(scope.caller.args) - len(placeholders)
            gone = {at for at, placeholder in enumerate(placeholders, first) if placeholder in nodes}
            scope.caller.args = tuple(a for i, a in enumerate(scope.caller.args) if i not in gone)
        elif not added.registered:
            weights = [node for node, name in scope.parameters.items() if name in ffns]
            exchange(weights, nodes, {name: added.node(scope, name) for name in added.drawn}, graph)
        for node in set(graph.nodes).intersection(nodes):
            graph.erase_node(node)
    parameters = dict(scopes[0].module.named_parameters(remove_duplicate=False))
    gone = {id(parameters[name]) for name in removed & parameters.keys()}
    for name in [name for name, parameter in parameters.items() if id(parameter) in gone]:
        path, _, leaf = name.rpartition(".")
        delattr(scopes[0].module.get_submodule(path), leaf)
