"""How a captured graph takes its inputs, and which it takes after some of them were exchanged."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from memcompile.passes._torch import PyTreeCodeGen, pytree


class Signature:
    """The structure that a graph's placeholders are passed in: ``f(params, x)`` with a dict of weights has one, a
    graph that takes its placeholders one by one has none.

    Attributes:
        structure: the arguments, with the placeholder at each leaf; None for a flat graph.
    """

    def __init__(self, graph: fx.Graph, outside: Sequence[fx.Node] = ()) -> None:
        """
        Args:
            outside: placeholders that the graph does not take yet.
        """
        self.graph = graph
        self.structure: Any = None
        codegen, placeholders = graph._codegen, [n for n in graph.find_nodes(op="placeholder") if n not in outside]
        if isinstance(codegen, PyTreeCodeGen) and codegen.pytree_info.in_spec.num_leaves == len(placeholders):
            self.structure = pytree.tree_unflatten(placeholders, codegen.pytree_info.in_spec)

    def keys_with(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, str] | None:
        """The key of every placeholder in the dicts that hold ``nodes``; None where one is in no dict of strings."""
        keys: dict[fx.Node, str] = {}
        for holder in self._dicts(self.structure):
            if any(node in holder.values() for node in nodes):
                keys |= {value: key for key, value in holder.items()}
        return keys if nodes and all(node in keys for node in nodes) else None

    def exchange(self, together: Sequence[fx.Node], removed: Sequence[fx.Node], added: Mapping[str, fx.Node]) -> None:
        """Takes ``removed`` no longer, and passes ``added``, the graph's last placeholders, by name in the
        dict that holds ``together``. Without one such dict the graph takes its placeholders one by one.
        """
        holder = next((d for d in self._dicts(self.structure) if set(together) <= set(d.values())), None)
        if holder is None:
            self.graph.set_codegen(fx.graph.CodeGen())
            return
        for key in [key for key, value in holder.items() if value in removed]:
            del holder[key]
        holder.update(added)
        leaves, spec = pytree.tree_flatten(self.structure)
        for node, following in itertools.pairwise(leaves):
            node.append(following)  # placeholders stand in the order of the leaves
        codegen = self.graph._codegen
        assert isinstance(codegen, PyTreeCodeGen)
        self.graph.set_codegen(PyTreeCodeGen(codegen.pytree_info._replace(in_spec=spec)))

    def _dicts(self, structure: Any) -> list[dict[str, Any]]:
        """Every dict from names to placeholders in the structure, outer ones first."""
        if isinstance(structure, dict):
            weights = all(isinstance(k, str) and isinstance(v, fx.Node) for k, v in structure.items())
            return [structure] if weights else [d for value in structure.values() for d in self._dicts(value)]
        if isinstance(structure, (list, tuple)):
            return [d for value in structure for d in self._dicts(value)]
        return []
