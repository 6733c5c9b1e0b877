"""A pass over Inductor's graphs: sparse gradients of one table become one operator, where autograd adds them.

Several layers share the values, and their gradients are sums of sparse tensors, which Inductor cannot lower. One
operator with the factors of all of them sorts the hits once and sums each row once.

Inductor reads strides and storages, which a sparse tensor has not, and a graph only returns the gradient. So the
operator is told to be opaque: its result is a strided tensor, whose strides are zero, until it runs.
"""

import torch
from torch import fx

from memcompile.lowering.register.schema import operator


def merge_scatters(graph: fx.Graph) -> int:
    """Merges sums of `sparse_scatter`, in place. Returns how many scatters there were."""
    scatter = operator("sparse_scatter")
    parts: dict[fx.Node, list[fx.Node]] = {}  # the scatters that a sparse node sums
    for node in graph.nodes:
        if node.target is scatter:
            parts[node] = [node]
        elif node.target is torch.ops.aten.add.Tensor and not node.kwargs and parts.keys() >= {*node.args}:
            parts[node] = [part for summand in node.args for part in parts[summand]]
    for node, scattered in reversed(parts.items()):
        outside = [user for user in node.users if user not in parts]
        if outside:
            factors = [[factor for part in scattered for factor in part.args[i]] for i in (1, 2, 3)]  # type: ignore[union-attr]
            with graph.inserting_before(node):
                merged = graph.call_function(scatter, (scattered[0].args[0], *factors, True))  # type: ignore[arg-type]
            node.replace_all_uses_with(merged, delete_user_cb=outside.__contains__)
        if not node.users:
            graph.erase_node(node)
    return sum(node.target is scatter for node in parts)
