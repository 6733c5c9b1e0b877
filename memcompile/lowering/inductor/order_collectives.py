"""A pass over Inductor's graphs: collectives stay in the order in which they were traced, on every rank.

Inductor orders what does not depend on each other by sizes, which differ where ranks have other numbers of tokens; and
a rank that starts its collectives in another order waits for ever. Mostly each depends on the one before, through the
tokens. Where it does not (layers that are recomputed, branches side by side) the pass makes it: `in_order` is a copy of
what is sent that waits for what came before.
"""

import itertools

import torch
from torch import Tensor, fx

from memcompile.lowering.register.operators import register_for_graphs
from memcompile.lowering.register.schema import operator


def order_collectives(graph: fx.Graph) -> int:
    """Adds what the graph lacks for a total order of its collectives, in place. Returns how many it makes wait."""
    waiting = 0
    wait = torch.ops._c10d_functional.wait_tensor.default
    functional = [node for node in graph.nodes if getattr(node.target, "namespace", None) == "_c10d_functional"]
    started = [node for node in functional if node.target is not wait]
    for before, after in itertools.pairwise(started):
        if not _depends(after, before):
            done = next((user for user in before.users if user.target is wait), before)
            with graph.inserting_before(after):
                sent = after.args[0]
                copy = graph.call_function(operator("in_order"), (sent, done))
                copy.meta.update(sent.meta if isinstance(sent, fx.Node) else {})
            after.update_arg(0, copy)
            waiting += 1
    return waiting


def _depends(node: fx.Node, on: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    ahead = {node}
    while ahead and on not in ahead:
        seen |= ahead
        ahead = {argument for later in ahead for argument in later.all_input_nodes} - seen
    return on in ahead


def _in_order(tensor: Tensor, after: Tensor) -> Tensor:
    return tensor.clone()


def _fake(tensor: Tensor, after: Tensor) -> Tensor:
    return torch.empty_like(tensor)


register_for_graphs("in_order", _in_order, _fake, "CompositeExplicitAutograd")
