"""Where a captured graph asks for its capacity, the most tokens that a rank of the memory group has.

The graph assumes nothing of that size, since the ranks agree on it just before each run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from memcompile.errors import CaptureError
from memcompile.passes._torch import free_unbacked_symbols
from memcompile.passes.checks.captured_memory import POSITIONS, is_lookup, operators_in, placeholders_of

_CAPACITY, _GROUP = POSITIONS["capacity"], POSITIONS["group"]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the ranks of a group must agree on before a graph runs.

    Attributes:
        group: name of the process group.
        position: of the capacity among the graph's inputs.
        sized: positions of inputs without numbers that have it for a size (torch 2.11).
        tokens: how many tokens the lookups of the graph have, in symbols.
        symbols: where these are: the position of an input, and the dimension of a tensor or None for a size.
    """

    group: str
    position: int
    sized: tuple[int, ...]
    tokens: tuple[sympy.Expr, ...]
    symbols: dict[sympy.Symbol, tuple[int, int | None]]

    @property
    def has_an_empty_lookup(self) -> bool:
        """Whether a lookup of the graph has no tokens, whatever the inputs."""
        return 0 in self.tokens

    def fill_in(self, given: list[Any], capacity: int) -> None:
        """Puts the capacity that was agreed upon among the inputs."""
        given[self.position] = capacity
        for position in self.sized:
            given[position] = given[position].new_empty(1).expand(capacity)

    def most_tokens(self, inputs: Sequence[Any]) -> int:
        """The most tokens that a lookup has on this rank, for these inputs."""
        read = {
            symbol: inputs[at] if dim is None else inputs[at].shape[dim] for symbol, (at, dim) in self.symbols.items()
        }
        return max(int(expression.subs(read)) for expression in self.tokens)


def agreement_of(graph_module: fx.GraphModule, inputs: Sequence[object]) -> Agreement | None:
    """What the ranks must agree on before each run of a captured graph; None where there is nothing.

    Raises:
        CaptureError: the number of tokens is data-dependent in the graph.
    """
    positions = {_expression(value): at for at, value in enumerate(inputs) if isinstance(value, torch.SymInt)}
    found: set[tuple[str, int]] = set()
    tokens: list[sympy.Expr] = []
    for node, binding in operators_in(graph_module, inputs):
        capacity = node.args[_CAPACITY] if is_lookup(node) and len(node.args) > _CAPACITY else None
        x = node.args[0] if node.args else None
        if isinstance(capacity, fx.Node) and isinstance(x, fx.Node):
            agreed = _expression(binding.get(capacity, capacity.meta.get("example_value")))
            if not free_unbacked_symbols(agreed):
                continue  # computed from the inputs, which are promised to have the same sizes on each rank
            found.add((str(node.args[_GROUP]), positions[agreed]))
            shape = x.meta["example_value"].shape
            tokens.append(sympy.sympify(math.prod(map(_expression, shape[:-1]))))
    if not found:
        return None
    if len(found) > 1:
        raise CaptureError("memcompile: one graph runs layers of two sharded memories: compile the models apart")
    ((group, position),) = found
    symbols = _symbols(inputs)
    unknown = set().union(*(expression.free_symbols for expression in tokens)) - symbols.keys()
    if unknown:
        raise CaptureError(
            f"memcompile: how many tokens a memory layer has depends on data ({', '.join(map(str, unknown))}), and the "
            f"ranks cannot agree on it before the graph runs: shard with tokens='even', or pad"
        )
    sized = [at for at, node in enumerate(placeholders_of(graph_module)) if _has_size(node, inputs[position])]
    return Agreement(group, position, tuple(sized), tuple(dict.fromkeys(tokens)), symbols)


def _has_size(placeholder: fx.Node, size: object) -> bool:
    value = placeholder.meta.get("example_value")  # the inputs themselves may have numbers for sizes
    return isinstance(value, torch.Tensor) and list(map(_expression, value.shape)) == [_expression(size)]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _symbols(inputs: Sequence[object]) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """Where each symbol of the inputs' sizes can be read."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for at, value in enumerate(inputs):
        sizes: list[tuple[Any, int | None]] = [(value, None)] if isinstance(value, torch.SymInt) else []
        sizes += [(size, dim) for dim, size in enumerate(value.shape)] if isinstance(value, torch.Tensor) else []
        for size, dim in sizes:
            expression = _expression(size)
            if isinstance(expression, sympy.Symbol):
                found.setdefault(expression, (at, dim))
    return found
