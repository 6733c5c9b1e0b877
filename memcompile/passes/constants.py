"""Which nodes of a graph depend on no input: made of parameters, buffers, shapes and random numbers alone."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from memcompile.common.token_wise import CASTS, POINTWISE, RESHAPES
from memcompile.passes._torch import OpOverload
from memcompile.passes.fx import aliases, ancestors, fake_value, is_in_place, memory_root, operator_name


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
            if is_in_place(node) and node not in constants and (root := memory_root(node)) in constants
        }
        if not found:
            return frozenset(constants)
        written |= found


def is_random(node: fx.Node) -> bool:
    """Whether a constant is drawn anew at each call, and made of nothing else (a dropout that the model spells out)."""
    made_of = ancestors(node)
    leaves = (leaf for leaf in made_of if not leaf.all_input_nodes and not _draws(leaf))
    return any(map(_draws, made_of)) and all(operator_name(leaf) == "empty" or is_uniform(leaf) for leaf in leaves)


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def is_uniform(node: fx.Node) -> bool:
    """Whether every element of a constant is one number: zeros, ones, full, and what is computed of such."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        value, name = fake_value(current), operator_name(current)
        if name in _FILLED:
            if any(is_in_place(alias) and alias is not current for alias in aliases(current)):
                return False
        elif value is None or value.numel() != 1:
            inputs = current.all_input_nodes
            if name not in POINTWISE | CASTS | RESHAPES or not inputs:
                return False
            pending.extend(a for a in inputs if a not in seen)
            seen.update(inputs)
    return True


_FILLED = frozenset({"zeros", "ones", "full", "scalar_tensor"})
