"""Brings a captured graph into the form that the matcher reads. Decides nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcompile.passes.fx import fake_value, is_in_place, is_view, operator_name


def normalize(graph: fx.Graph) -> int:
    """Rewires, in place, every later use of a mutated tensor to the operator that mutated it; replaces operands
    that give only a shape or dtype by that shape or dtype; drops dead views. Other dead code stays: its result may
    have been kept on a module or by a hook.

    Afterwards an in-place operator reads like its functional form: its node is the value, its first argument
    the value before. Mutations stay in program order, so the graph still computes what it did.

    Returns:
        How many nodes were changed or dropped.
    """
    changed = {node for node in graph.nodes if _drop_metadata_operand(node)}
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        mutated = node.args[0] if is_in_place(node) else None
        if isinstance(mutated, fx.Node) and mutated.op != "placeholder":
            later = [user for user in mutated.users if position[user] > position[node]]
            for user in later:
                user.replace_input_with(mutated, node)
            changed.update(later)
    graph.eliminate_dead_code(lambda node: not is_view(node) or operator_name(node) == "detach")
    kept = set(graph.nodes)
    return len(changed & kept) + len(position) - len(kept)


def _drop_metadata_operand(node: fx.Node) -> bool:
    """Whether the node read a tensor for its shape or dtype alone, which it then has as a constant."""
    value, name = fake_value(node), operator_name(node)
    if value is not None and node.target in _METADATA_FORMS:
        node.target, attribute = _METADATA_FORMS[node.target]
        node.args = (node.args[0], getattr(value, attribute))
    elif value is not None and name in _FACTORIES:
        fill = [a for a in (*node.args[1:], node.kwargs.get("fill_value")) if isinstance(a, (bool, int, float))]
        node.target = _FACTORIES[name]
        node.args = (tuple(value.shape), *(fill[:1] if node.target is aten.full.default else []))
        node.kwargs = {"dtype": value.dtype, "device": value.device}
    else:
        return False
    return True


aten = torch.ops.aten
# Factories that read the shape and dtype of an operand, and what makes the same tensor without it.
_FACTORIES: dict[str, Any] = {
    "empty_like": aten.empty.memory_format,
    "new_empty": aten.empty.memory_format,
    "rand_like": aten.rand.default,
    "randn_like": aten.randn.default,
}
for _name in ("zeros", "ones", "full"):
    _FACTORIES |= dict.fromkeys((f"{_name}_like", f"new_{_name}"), getattr(aten, _name).default)

_METADATA_FORMS = {
    aten.type_as.default: (aten.to.dtype, "dtype"),
    aten.view_as.default: (aten.view.default, "shape"),
    aten.reshape_as.default: (aten.reshape.default, "shape"),
    aten.expand_as.default: (aten.expand.default, "shape"),
}
