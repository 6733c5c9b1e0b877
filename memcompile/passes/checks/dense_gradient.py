"""In a graph that reads the values outside of its lookups too, their gradient cannot be sparse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from memcompile.passes.checks.captured_memory import (
    POSITIONS,
    calls_a_body,
    is_lookup,
    names_by_identity,
    operators_in,
)

_VALUES_GRAD = POSITIONS["values_grad"]


def make_dense_where_read(
    graph_module: fx.GraphModule, inputs: Sequence[object], values: Sequence[torch.Tensor]
) -> int:
    """Gives all lookups of a captured graph a dense gradient, in place, where something else reads the values: autograd
    would add a sparse gradient to that of a penalty on the table, which is dense, and cannot trace it.

    Args:
        graph_module, inputs: as for `verify_captured_memory`.
        values: of the pools whose layers the graph may run.

    Returns:
        How many lookups have got one.
    """
    tables = names_by_identity({"values": values}, inputs)
    lookups, read = [], False
    for node, binding in operators_in(graph_module, inputs):
        if is_lookup(node):
            lookups.append(node)
        elif not calls_a_body(node):
            read = read or any(id(binding.get(a)) in tables for a in node.all_input_nodes)
    if not read:
        return 0
    for node in lookups:
        node.args = (*node.args[:_VALUES_GRAD], "dense", *node.args[_VALUES_GRAD + 1 :])
    return len(lookups)
