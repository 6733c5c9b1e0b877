"""What a compiled graph that reads sharded values takes at each run: the values as they are then, and its capacity.

The capacity is the most tokens that a rank of the memory group has. The graph assumes nothing of that size, since the
ranks agree on it just before each run.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from memcompile._torch import free_unbacked_symbols
from memcompile.errors import CaptureError
from memcompile.lowering._torch import is_traced
from memcompile.lowering.distributed.sharded_table import most_tokens
from memcompile.passes.checks.captured_memory import (
    POSITIONS,
    is_lookup,
    is_updating,
    names_by_identity,
    operators_in,
    placeholders_of,
)
from memcompile.runtime.distributed.collective_errors import named_collectives
from memcompile.runtime.pool import MemoryPool


@dataclasses.dataclass(frozen=True)
class Table:
    """Where a graph has the part of a pool's values, and what that was when it was captured. It does not keep the model
    alive: Dynamo keeps what was compiled as long as that is.
    """

    pool_of: weakref.ref[MemoryPool]
    position: int  # among the inputs
    captured: tuple[torch.dtype, torch.Size, torch.device]

    def now(self) -> torch.Tensor:
        """The part as it is now.

        Raises:
            CaptureError: it was cast or moved since the graph was captured.
        """
        pool = self.pool_of()
        assert pool is not None, "the model that runs is alive"
        table = pool.table.part
        if (table.dtype, table.shape, table.device) != self.captured:
            dtype, shape, device = self.captured
            raise CaptureError(
                f"the memory's values are {table.dtype} {list(table.shape)} on {table.device} now, and were {dtype} "
                f"{list(shape)} on {device} when the model was compiled: cast and move it before compiling"
            )
        return table


def tables_among(inputs: Sequence[object], pools: Sequence[MemoryPool]) -> list[Table]:
    """Where the parts of sharded values are among the inputs of a graph that was captured just now.

    Raises:
        CaptureError: the values were cast or moved, and the graph has them as they were.
    """
    found: list[Table] = []
    for pool in pools:
        part = pool.table.part_in_graphs
        owner = names_by_identity({"": [part]}, inputs)
        table = Table(weakref.ref(pool), -1, (part.dtype, part.shape, part.device))
        table.now()
        found += [dataclasses.replace(table, position=at) for at, value in enumerate(inputs) if id(value) in owner]
    return found


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the ranks of a group must agree on before a graph runs.

    Attributes:
        group: name of the process group.
        position: of the capacity among the graph's inputs.
        sized: positions of inputs without numbers that have it for a size (torch 2.11).
        tokens: how many tokens the lookups of the graph have, in symbols; 0 where there are none, whatever the inputs.
        in_statistics: those of them of which layers take statistics, in training.
        symbols: where these are: the position of an input, and the dimension of a tensor or None for a size.
    """

    group: str
    position: int
    sized: tuple[int, ...]
    tokens: tuple[sympy.Expr, ...]
    in_statistics: frozenset[sympy.Expr]
    symbols: dict[sympy.Symbol, tuple[int, int | None]]

    def fill_in(self, given: list[Any], device: torch.device) -> None:
        """Puts the capacity on which the ranks agree for these inputs among them. A collective, which raises as
        `most_tokens` does.
        """
        read = {
            symbol: given[at] if dim is None else given[at].shape[dim] for symbol, (at, dim) in self.symbols.items()
        }
        numbers = {expression: int(expression.subs(read)) for expression in self.tokens}
        too_few = any(numbers[expression] == 1 for expression in self.in_statistics)
        capacity = most_tokens(max(numbers.values()), self.group, device, too_few)
        given[self.position] = capacity
        for position in self.sized:
            given[position] = given[position].new_empty(1).expand(capacity)


def agreement_of(graph_module: fx.GraphModule, inputs: Sequence[object]) -> Agreement | None:
    """What the ranks must agree on before each run of a captured graph; None where there is nothing: ranks have equally
    many tokens, or the same.

    Raises:
        CaptureError: the number of tokens is data-dependent in the graph.
    """
    positions = {_expression(value): at for at, value in enumerate(inputs) if isinstance(value, torch.SymInt)}
    at = POSITIONS["capacity"]
    found: set[tuple[str, int]] = set()
    tokens: list[sympy.Expr] = []
    in_statistics: set[sympy.Expr] = set()
    for node, binding in operators_in(graph_module, inputs):
        capacity = node.args[at] if is_lookup(node) and len(node.args) > at else None
        if isinstance(capacity, fx.Node):
            agreed = _expression(binding.get(capacity, capacity.meta.get("example_value")))
            if not free_unbacked_symbols(agreed):
                continue  # computed from the inputs, which are promised to have the same sizes on each rank
            found.add((str(node.args[POSITIONS["group"]]), positions[agreed]))
            shape = node.all_input_nodes[0].meta["example_value"].shape
            tokens.append(sympy.sympify(math.prod(map(_expression, shape[:-1]))))
            in_statistics.update(tokens[-1:] if is_updating(node) else ())
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
    # By what Dynamo says of the inputs: they themselves may have numbers for sizes.
    values = [node.meta.get("example_value") for node in placeholders_of(graph_module)]
    capacity = [_expression(inputs[position])]
    sizes = [[*map(_expression, v.shape)] if isinstance(v, torch.Tensor) else None for v in values]
    sized = [at for at, size in enumerate(sizes) if size == capacity]
    return Agreement(group, position, tuple(sized), tuple(dict.fromkeys(tokens)), frozenset(in_statistics), symbols)


def run_sharded(lowered: Callable[..., Any], tables: list[Table], agreement: Agreement | None) -> Callable[..., Any]:
    """Has a compiled graph run with the values as they are then, and with the capacity on which the ranks agree."""

    def run(*args: Any) -> Any:
        if is_traced(args[tables[0].position]):
            return lowered(*args)  # DDP, which asks for the strides of the outputs to compile the next bucket's graph
        given = list(args)
        for table in tables:
            given[table.position] = table.now()
        with named_collectives("forward"):
            if agreement is not None:
                agreement.fill_in(given, given[tables[0].position].device)
            return lowered(*given)

    return run


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _symbols(inputs: Sequence[object]) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """Where each symbol of the inputs' sizes can be read."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for at, value in enumerate(inputs):
        sizes: dict[int | None, Any] = {None: value} if isinstance(value, torch.SymInt) else {}
        sizes.update(enumerate(value.shape) if isinstance(value, torch.Tensor) else ())
        for dim, size in sizes.items():
            if isinstance(_expression(size), sympy.Symbol):
                found.setdefault(_expression(size), (at, dim))
    return found
