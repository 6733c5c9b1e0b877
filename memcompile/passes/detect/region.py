"""The hidden region of an FFN: everything between its projections, and the proofs that it is closed."""

from __future__ import annotations

import dataclasses

from torch import fx

from memcompile.common.token_wise import CASTS, RESHAPES, TOKEN_WISE
from memcompile.passes.capture.sandbox import AUTOGRAD_FUNCTION
from memcompile.passes.capture.trace import Capture
from memcompile.passes.detect.projection import Projection
from memcompile.passes.fx import aliases, ancestors, features, is_in_place, operator_name

_BETWEEN = TOKEN_WISE | {"glu", "getitem", "min", "max"}
_REGION_LIMIT = 120  # nodes; the longest hidden region seen in 354 models has 31


class Refusal(Exception):
    """A failed proof: the sentence says why a candidate cannot get a memory."""


@dataclasses.dataclass(frozen=True)
class Region:
    """What lies between the up-projections and the down-projection.

    Attributes:
        up: the up-projections, in execution order.
        down: the down-projection.
        nodes: the nodes strictly between them that carry activations, in execution order.
        derived: nodes that compute something from the block's own parameters alone (``1 + gamma``).
        parameters: placeholders of the parameters read between them (inner norms, learned activations).
        branches: projections of something else that add to the hidden activation.
        foreign: other activations that enter between the projections from elsewhere.
        sources: the activations that the up-projections read, before views and casts: one, where it is an FFN.
    """

    up: tuple[Projection, ...]
    down: Projection
    nodes: tuple[fx.Node, ...]
    derived: frozenset[fx.Node]
    parameters: tuple[fx.Node, ...]
    branches: tuple[Projection, ...]
    foreign: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]

    @property
    def source(self) -> fx.Node:
        return self.sources[0]

    @property
    def all_nodes(self) -> frozenset[fx.Node]:
        """Every node that computes the block, the projections included."""
        return self.derived.union(self.nodes, self.down.nodes, *(p.nodes for p in self.up))

    @property
    def all_parameters(self) -> tuple[fx.Node, ...]:
        """Every parameter the block reads, projections first."""
        read = [p for q in (*self.up, self.down) for p in (q.weight, q.bias) if p is not None]
        return tuple(dict.fromkeys([*read, *self.parameters]))


def find_region(down: Projection, projections: dict[fx.Node, Projection], capture: Capture) -> Region | None:
    """Walks back from ``down`` until every path ends: at up-projections, at constants, or at what is foreign to an
    FFN. None where the up-projections found are no FFN's: none at all, or of widths that do not fit together.
    """
    up: dict[fx.Node, Projection] = {}
    between, constants, foreign = set[fx.Node](), set[fx.Node](), dict[fx.Node, None]()
    pending = [down.input]
    while pending:
        node = pending.pop()
        if node in projections:
            up[node] = projections[node]
        elif node in capture.constants:
            constants.add(node)
        elif operator_name(node) not in _BETWEEN or len(between) >= _REGION_LIMIT:
            if node not in between:
                foreign[node] = None
        elif node not in between:
            between.add(node)
            pending.extend(node.all_input_nodes)
    branches: tuple[Projection, ...] = ()
    fitting = {n: p for n, p in up.items() if p.width_in == down.width_out}
    if fitting and any(p.width_out == down.width_in for p in fitting.values()):  # the others are branches
        branches = tuple(p for n, p in up.items() if n not in fitting)
        up = fitting
    if not 1 <= len(up) <= 2 or any(p.width_in != down.width_out for p in up.values()):
        return None
    widths = [p.width_out for p in up.values()]
    if widths not in ([down.width_in], [2 * down.width_in], [down.width_in] * 2):
        return None
    derived: set[fx.Node] = set()  # from parameters, which are among them
    for node in sorted(set[fx.Node]().union(*map(ancestors, constants))):
        if node in capture.parameters or not derived.isdisjoint(node.all_input_nodes):
            derived.add(node)
    return Region(
        up=tuple(up[node] for node in sorted(up)),
        down=down,
        nodes=tuple(sorted(between)),
        derived=frozenset(derived - capture.parameters.keys()),
        parameters=tuple(sorted(derived & capture.parameters.keys())),
        branches=branches,
        foreign=tuple(foreign),
        sources=tuple(dict.fromkeys(strip_views(p.input) for p in up.values())),
    )


def prove_one_source(region: Region) -> None:
    """Raises Refusal where the block reads more than one activation, or weights that are no parameters."""
    for projection in (*region.up, region.down):
        if projection.derived:
            raise Refusal(
                "a weight of it is computed at each call (weight norm, pruning, quantisation, an index into a bank of "
                "experts): make it a plain parameter first"
            )
    if region.branches:
        raise Refusal("another projection adds to its hidden activation (LoRA, an adapter): merge it first")
    for node in region.foreign:
        what = "an activation from outside of the block" if node.op == "placeholder" else operator_name(node)
        raise Refusal(f"{what} stands between its projections, and is not known to treat each token alone")
    if len(region.sources) > 1:
        raise Refusal("its up-projections read two different activations")


def prove_closed(region: Region) -> None:
    """Raises Refusal where something outside the block reads its inside, or where its source is written to before
    the block ends: the memory reads the source at the end.
    """
    for projection in (*region.up, region.down):
        function = projection.node.meta.get(AUTOGRAD_FUNCTION)
        if function is not None:
            raise Refusal(f"it runs inside {function}, an autograd.Function with a backward of its own")
    inside = region.all_nodes
    for node in inside - {region.down.node}:
        for user in node.users:
            if user not in inside:
                raise Refusal(f"its hidden activation is also read by {operator_name(user)} outside of the block")
    for node in (*region.nodes, *region.derived):
        if is_in_place(node) and node.args[0] not in inside:
            raise Refusal(f"{operator_name(node)} writes in place to a tensor outside of the block")
    for node in aliases(region.source):
        if is_in_place(node) and region.up[0].node < node < region.down.node:
            raise Refusal(f"{operator_name(node)} writes in place to its source before the block ends")


def strip_views(node: fx.Node) -> fx.Node:
    """The activation that casts and views, which keep features last, were made of."""
    while operator_name(node) in CASTS | RESHAPES and isinstance(node.args[0], fx.Node):
        if features(node.args[0]) != features(node):
            break
        node = node.args[0]
    return node
