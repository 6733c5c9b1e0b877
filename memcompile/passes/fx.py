"""What every pass asks of a node: its operator's name, its value's shape, what it writes, what it is computed from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import fx

from memcompile.common.token_wise import CASTS, POINTWISE, RESHAPES, canonical
from memcompile.passes._torch import HigherOrderOperator, OpOverload

_FILLED = frozenset({"zeros", "ones", "full", "scalar_tensor"})


def operator_name(node: fx.Node) -> str:
    """``linear``, ``mul``, ``getitem`` ...: the operator without namespace, overload and in-place mark."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, OpOverload):
        return canonical(node.target._schema.name.split("::")[1])
    return getattr(node.target, "__name__", str(node.target))


def calls_a_body(node: fx.Node) -> bool:
    """Whether the node hands its operands to the body of a higher-order operator, a graph of its own."""
    return isinstance(node.target, HigherOrderOperator)


def is_in_place(node: fx.Node) -> bool:
    """Whether the operator writes into its first argument."""
    if not isinstance(node.target, OpOverload) or not node.args:
        return False
    first = node.target._schema.arguments[0]
    return first.alias_info is not None and first.alias_info.is_write


def is_view(node: fx.Node) -> bool:
    """Whether the operator only returns a view of its first argument, or one of several."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or is_in_place(node):
        return False
    returns = node.target._schema.returns
    return len(returns) > 0 and returns[0].alias_info is not None


def dimension_order(node: fx.Node, rank: int) -> list[int]:
    """Which dimension of its operand each dimension of a transpose is: the transpose of a tensor whose sizes tell."""
    numbered = torch.empty(tuple(range(1, rank + 1)), device="meta")
    assert isinstance(node.target, OpOverload)
    result = node.target(numbered, *node.args[1:], **node.kwargs)
    return [size - 1 for size in result.shape]


def memory_root(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` shares, itself where it has its own."""
    while _shares_memory(node):
        node = node.all_input_nodes[0]
    return node


def aliases(node: fx.Node) -> set[fx.Node]:
    """Every node that shares memory with ``node``."""
    return reach([memory_root(node)], lambda n: [u for u in n.users if _shares_memory(u) and u.all_input_nodes[0] is n])


def _shares_memory(node: fx.Node) -> bool:
    return (is_view(node) or is_in_place(node)) and bool(node.all_input_nodes)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and every node that it is computed from."""
    return reach([node], lambda n: n.all_input_nodes)


def reach(start: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes, and every node that ``following`` leads to from them."""
    found = set(start)
    pending = list(found)
    while pending:
        new = [node for node in following(pending.pop()) if node not in found]
        found.update(new)
        pending.extend(new)
    return found


def fake_value(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that the node produced, None where it produced something else."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def features(node: fx.Node) -> int:
    """The last dimension, 1 for a scalar, 0 where the node is no tensor."""
    value = fake_value(node)
    return 0 if value is None else int(value.shape[-1]) if value.dim() else 1


def ndim(node: fx.Node) -> int:
    """How many dimensions the node has, 0 where it is no tensor."""
    value = fake_value(node)
    return 0 if value is None else value.dim()


def tokens(node: fx.Node) -> int:
    """How many feature vectors the node holds: the product of all dimensions but the last."""
    value = fake_value(node)
    return 0 if value is None else value.shape[:-1].numel() if value.dim() else 1


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
