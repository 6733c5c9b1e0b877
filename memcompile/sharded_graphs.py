"""What happens around each run of a compiled graph that reads sharded values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from memcompile.errors import CaptureError
from memcompile.lowering.sharded_table import most_tokens
from memcompile.passes.capacity import Agreement
from memcompile.passes.verify import names_by_identity
from memcompile.runtime.collective_errors import named_collectives
from memcompile.runtime.pool import MemoryPool

Tables = list[tuple[MemoryPool, int, torch.Tensor]]  # a pool, and the place and kind of its part among inputs


def tables_among(inputs: Sequence[object], pools: Sequence[MemoryPool]) -> Tables:
    """Where the parts of sharded values are among the inputs of a graph that was captured just now.

    Raises:
        CaptureError: the values were cast or moved, and the graph has them as they were.
    """
    found: Tables = []
    for pool in pools:
        captured = pool.table_in_graphs
        owner = names_by_identity({"": [captured]}, inputs)
        found += [(pool, at, captured) for at, value in enumerate(inputs) if id(value) in owner]
        _check_as_captured(pool.table, captured)
    return found


def run_sharded(lowered: Callable[..., Any], tables: Tables, agreement: Agreement | None) -> Callable[..., Any]:
    """A graph that is run with the values as they are by then, and with the capacity on which the ranks agree.

    Args:
        lowered: the compiled graph.
        tables: where the values are among its inputs.
        agreement: None where ranks have equally many tokens, or the same.
    """

    def run(*args: Any) -> Any:
        given = list(args)
        for pool, at, captured in tables:
            _check_as_captured(pool.table, captured)
            given[at] = pool.table
        with named_collectives("forward"):
            if agreement is not None:
                given[agreement.place] = most_tokens(agreement.most(args), agreement.group, tables[0][2].device)
            return lowered(*given)

    return run


def _check_as_captured(table: torch.Tensor, captured: torch.Tensor) -> None:
    if table.dtype != captured.dtype or table.shape != captured.shape or table.device != captured.device:
        raise CaptureError(
            f"the memory's values are {table.dtype} {list(table.shape)} on {table.device} now, and were "
            f"{captured.dtype} {list(captured.shape)} on {captured.device} when the model was compiled: cast and move "
            f"it before compiling"
        )
