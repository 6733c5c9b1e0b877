"""Which nodes of a graph depend on no input: made of parameters, buffers, shapes and random numbers alone."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from memcompile.passes.normalize import aliases, fake_value, is_in_place, is_view, operator_name
from memcompile.token_wise import CASTS, POINTWISE, RESHAPES


def find_constants(graph: fx.Graph, given: Container[fx.Node]) -> frozenset[fx.Node]:
    """Every node whose ancestors among placeholders are all in ``given`` (parameters and buffers), those included.

    A constant that an activation is written into (a cache, running statistics, an output allocated first) is none.
    """
    written: set[fx.Node] = set()
    while True:
        constants: set[fx.Node] = set()
        for node in graph.nodes:
            made = node in given if node.op == "placeholder" else all(a in constants for a in node.all_input_nodes)
            if made and node not in written:
                constants.add(node)
        found = {
            root
            for node in graph.nodes
            if is_in_place(node) and node not in constants and (root := _root(node.args[0])) in constants
        }
        if not found:
            return frozenset(constants)
        written |= found


def is_random(node: fx.Node, constants: Container[fx.Node]) -> bool:
    """Whether a constant is drawn anew at each call, and made of nothing else (a dropout that the model spells out)."""
    pending, seen, drawn = [node], {node}, False
    while pending:
        current = pending.pop()
        draws = isinstance(current.target, torch._ops.OpOverload) and _SEEDED in current.target.tags
        drawn = drawn or draws
        if not current.all_input_nodes and not draws and operator_name(current) != "empty" and not is_uniform(current):
            return False
        new = [a for a in current.all_input_nodes if a in constants and a not in seen]
        seen.update(new)
        pending.extend(new)
    return drawn


_SEEDED = torch.Tag.nondeterministic_seeded


def is_uniform(node: fx.Node) -> bool:
    """Whether every element of a constant is one number: zeros, ones, full, and what is computed of such."""
    value = fake_value(node)
    if operator_name(node) in _FILLED:
        return not any(is_in_place(alias) and alias is not node for alias in aliases(node))
    if node.op == "placeholder" or (value is not None and value.numel() == 1):
        return value is not None and value.numel() == 1
    inputs = node.all_input_nodes
    return operator_name(node) in POINTWISE | CASTS | RESHAPES and bool(inputs) and all(map(is_uniform, inputs))


_FILLED = frozenset({"zeros", "ones", "full", "scalar_tensor"})


def _root(node: object) -> fx.Node | None:
    """The tensor whose memory a node shares."""
    while isinstance(node, fx.Node) and (is_view(node) or is_in_place(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) else None
