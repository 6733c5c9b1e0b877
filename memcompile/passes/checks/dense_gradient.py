"""Pass 7, dense gradient: in a graph that reads the values otherwise too, their gradient cannot be sparse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from memcompile.passes.checks.captured_memory import (
    PLACES,
    is_lookup,
    names_by_identity,
    operators_in,
    passes_on,
    placeholders_of,
)

_VALUES_GRAD = PLACES["values_grad"]


def make_dense_where_read(
    graph_module: fx.GraphModule, inputs: Sequence[object], values: Sequence[torch.Tensor]
) -> bool:
    """Gives all lookups of a captured graph a dense gradient, in place, where something else reads the values: autograd
    would add a sparse gradient to that of a penalty on the table, which is dense, and cannot trace it.

    Args:
        graph_module, inputs: as for `verify`.
        values: of the pools whose layers the graph may run.

    Returns:
        Whether it was so.
    """
    tables = names_by_identity({"values": values}, inputs)
    lookups, read = [], False
    for node, binding in operators_in(graph_module, dict(zip(placeholders_of(graph_module), inputs, strict=False))):
        if is_lookup(node):
            lookups.append(node)
        elif not passes_on(node):
            read = read or any(id(binding.get(a)) in tables for a in node.all_input_nodes)
    for node in lookups if read else ():
        node.args = (*node.args[:_VALUES_GRAD], "dense", *node.args[_VALUES_GRAD + 1 :])
    return read
