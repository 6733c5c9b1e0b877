"""The hidden region of an FFN: everything between its projections, and the proofs that it works token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import fx

from memcompile.passes.normalize import fake_value, features, is_in_place, is_view, operator_name, tokens
from memcompile.passes.projection import Projection
from memcompile.passes.trace import Capture
from memcompile.token_wise import (
    ACTIVATIONS,
    ARITHMETIC,
    CASTS,
    DROPOUTS,
    FEATURE_REDUCTIONS,
    FEATURE_SPLITS,
    NORMS,
    RESHAPES,
)

_TOKEN_WISE = ACTIVATIONS | ARITHMETIC | CASTS | DROPOUTS | NORMS | FEATURE_REDUCTIONS | RESHAPES | FEATURE_SPLITS
_REGION_LIMIT = 120  # nodes; the longest hidden region seen in 354 models has 31


class Refusal(Exception):
    """A failed proof: the sentence says why a candidate is left alone."""


@dataclasses.dataclass(frozen=True)
class Region:
    """What lies between the up-projections and the down-projection.

    Attributes:
        up: the up-projections, in execution order.
        down: the down-projection.
        nodes: the nodes strictly between them, in execution order.
        parameters: placeholders of the parameters read between them (inner norms, learned activations).
        source: the activation that every up-projection reads, before views and casts.
    """

    up: tuple[Projection, ...]
    down: Projection
    nodes: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    source: fx.Node

    @property
    def all_nodes(self) -> frozenset[fx.Node]:
        """Every node that computes the block, the projections included."""
        return frozenset(self.nodes).union(self.down.nodes, *(p.nodes for p in self.up))

    @property
    def all_parameters(self) -> tuple[fx.Node, ...]:
        """Every parameter the block reads, projections first."""
        read = [p for q in (*self.up, self.down) for p in (q.weight, q.bias) if p is not None]
        return tuple(dict.fromkeys([*read, *self.parameters]))


def find_region(down: Projection, projections: dict[fx.Node, Projection], capture: Capture) -> Region | None:
    """Walks back from ``down`` until every path ends at up-projections. None where that is no FFN's shape:
    the paths end elsewhere, or the widths do not fit together.
    """
    up: dict[fx.Node, Projection] = {}
    between: dict[fx.Node, None] = {}
    parameters: dict[fx.Node, None] = {}
    pending = [down.input]
    while pending:
        node = pending.pop()
        if node in up or node in between or node in parameters:
            continue
        if node in projections:
            up[node] = projections[node]
        elif node in capture.parameters:
            parameters[node] = None
        elif _is_token_wise(node) and len(between) < _REGION_LIMIT:
            between[node] = None
            pending.extend(node.all_input_nodes)
        elif not _is_scalar(node):
            return None
    source = _common_source(up.values())
    if source is None or len(up) > 2 or any(p.width_in != down.width_out for p in up.values()):
        return None
    widths = [p.width_out for p in up.values()]
    if widths not in ([down.width_in], [2 * down.width_in], [down.width_in] * 2):
        return None
    position = {node: index for index, node in enumerate(capture.graph.nodes)}
    return Region(
        up=tuple(sorted(up.values(), key=lambda p: position[p.node])),
        down=down,
        nodes=tuple(sorted(between, key=position.__getitem__)),
        parameters=tuple(parameters),
        source=source,
    )


def prove_token_wise(region: Region) -> None:
    """Raises Refusal unless each token of the output depends on that token of the source alone, nonlinearly."""
    hidden, count = region.down.width_in, tokens(region.up[0].node)
    if hidden == region.down.width_out:
        raise Refusal(f"its hidden width equals the model's ({hidden}): more likely a head or a projector than an FFN")
    if hidden < region.down.width_out:
        raise Refusal(f"its hidden width {hidden} is below the model's {region.down.width_out}: an adapter, not an FFN")
    if tokens(region.source) != count or tokens(region.down.node) != count:
        raise Refusal("its source and its output do not hold the same tokens")
    for node in region.nodes:
        if fake_value(node) is None or _is_scalar(node):
            continue
        if tokens(node) != count or features(node) not in (1, hidden, 2 * hidden):
            raise Refusal(f"{operator_name(node)} reshapes the hidden activation to {_shape(node)}")
    for parameter in region.parameters:
        value = fake_value(parameter)
        if value is None or value.numel() not in (1, hidden, 2 * hidden) or value.numel() != features(parameter):
            raise Refusal(f"a parameter {_shape(parameter)} that is no vector of hidden features enters between them")
    if not any(_is_nonlinear(node) for node in _hidden_path(region)):
        raise Refusal("there is no nonlinearity between its projections: a low-rank factorisation, not an FFN")


def prove_closed(region: Region) -> None:
    """Raises Refusal where something outside the block reads its inside, or where its source is written to before
    the block ends: the memory reads the source at the end.
    """
    inside = region.all_nodes
    for node in inside - {region.down.node}:
        for user in node.users:
            if user not in inside:
                raise Refusal(f"its hidden activation is also read by {operator_name(user)} outside of the block")
    for node in region.nodes:
        if is_in_place(node) and node.args[0] not in inside:
            raise Refusal(f"{operator_name(node)} writes in place to a tensor outside of the block")
    for node in _aliases(region.source):
        if is_in_place(node) and region.up[0].node < node < region.down.node:
            raise Refusal(f"{operator_name(node)} writes in place to its source before the block ends")


def strip_views(node: fx.Node) -> fx.Node:
    """The activation behind casts and views that keep features last."""
    while operator_name(node) in CASTS | RESHAPES and isinstance(node.args[0], fx.Node):
        if features(node.args[0]) != features(node):
            break
        node = node.args[0]
    return node


def _common_source(up: Iterable[Projection]) -> fx.Node | None:
    sources = {strip_views(projection.input) for projection in up}
    return sources.pop() if len(sources) == 1 else None


def _is_token_wise(node: fx.Node) -> bool:
    name = operator_name(node)
    if name == "getitem":
        return True  # of a chunk or split; its own operand is looked at next
    if name not in _TOKEN_WISE:
        return False
    if name in FEATURE_SPLITS or name in FEATURE_REDUCTIONS:
        return _acts_on_features(node)
    if name in RESHAPES:
        return isinstance(node.args[0], fx.Node) and features(node.args[0]) == features(node)
    if name in NORMS:
        shape = node.args[1]
        return isinstance(shape, (list, tuple)) and len(shape) == 1
    return True


def _acts_on_features(node: fx.Node) -> bool:
    """Whether a split or a reduction is over the last dimension alone."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    dim = values.get("dim", 0 if operator_name(node) in FEATURE_SPLITS else None)
    operand = fake_value(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if operand is None or dim is None:
        return False
    dims = dim if isinstance(dim, (list, tuple)) else [dim]
    if any(d not in (-1, operand.dim() - 1) for d in dims):
        return False
    return operator_name(node) in FEATURE_SPLITS or bool(values.get("keepdim"))


def _hidden_path(region: Region) -> set[fx.Node]:
    """The nodes between the projections that carry the hidden activation; what only feeds a norm's statistics
    (one number a token) is not among them.
    """
    between, path, pending = set(region.nodes), set[fx.Node](), [region.down.input]
    while pending:
        node = pending.pop()
        if node in between and node not in path and features(node) != 1:
            path.add(node)
            pending.extend(node.all_input_nodes)
    return path


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Every node that shares memory with ``node``."""

    def shares(node: fx.Node) -> bool:
        return is_view(node) or is_in_place(node)

    while shares(node):
        node = node.all_input_nodes[0]
    found, pending = set[fx.Node](), [node]
    while pending:
        node = pending.pop()
        found.add(node)
        pending.extend(u for u in node.users if u not in found and shares(u) and u.all_input_nodes[0] is node)
    return found


def _is_nonlinear(node: fx.Node) -> bool:
    name = operator_name(node)
    if name == "mul":
        operands = [a for a in node.args if isinstance(a, fx.Node) and features(a) > 1 and tokens(a) > 1]
        return len(operands) == 2  # a gate
    return name in ACTIVATIONS


def _is_scalar(node: fx.Node) -> bool:
    value = fake_value(node)
    return value is not None and value.numel() == 1 and not node.all_input_nodes


def _shape(node: fx.Node) -> str:
    value = fake_value(node)
    return str(list(value.shape)) if value is not None else operator_name(node)
