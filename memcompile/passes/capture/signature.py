"""How a captured graph takes its inputs, and which it takes after some of them were exchanged."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx

from memcompile.passes._torch import PyTreeCodeGen, pytree

Structure = Any  # of a graph's arguments, with the placeholder at each leaf; None for a flat graph


def structure_of(graph: fx.Graph, outside: Collection[fx.Node] = ()) -> Structure:
    """The structure that a graph's placeholders are passed in: ``f(params, x)`` with a dict of weights has one, a graph
    that takes its placeholders one by one has none. Those ``outside`` are not taken yet.
    """
    codegen, placeholders = graph._codegen, [n for n in graph.find_nodes(op="placeholder") if n not in outside]
    if isinstance(codegen, PyTreeCodeGen) and codegen.pytree_info.in_spec.num_leaves == len(placeholders):
        return pytree.tree_unflatten(placeholders, codegen.pytree_info.in_spec)
    return None


def keys_with(nodes: Sequence[fx.Node], graph: fx.Graph) -> dict[fx.Node, str] | None:
    """The key of every placeholder in the dicts that hold ``nodes``; None where one is in no dict of strings."""
    holders = [d for d in _dicts(structure_of(graph)) if any(node in d.values() for node in nodes)]
    keys = {value: key for holder in holders for key, value in holder.items()}
    return keys if nodes and all(node in keys for node in nodes) else None


def exchange(
    together: Sequence[fx.Node], removed: Sequence[fx.Node], added: Mapping[str, fx.Node], graph: fx.Graph
) -> None:
    """Has a graph no longer take ``removed``, and take ``added``, its last placeholders, by name in the dict that holds
    ``together``. Without one such dict the graph takes its placeholders one by one.
    """
    structure = structure_of(graph, outside=added.values())
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


def _dicts(structure: Structure) -> list[dict[str, Any]]:
    """Every dict from names to placeholders in the structure, outer ones first."""
    if isinstance(structure, dict):
        if all(isinstance(k, str) and isinstance(v, fx.Node) for k, v in structure.items()):
            return [structure]
        structure = list(structure.values())
    return [d for value in structure for d in _dicts(value)] if isinstance(structure, (list, tuple)) else []
