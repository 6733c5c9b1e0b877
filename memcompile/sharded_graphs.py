"""What happens around each run of a compiled graph that reads sharded values."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from memcompile.errors import CaptureError
from memcompile.lowering._torch import is_traced
from memcompile.lowering.distributed.sharded_table import most_tokens
from memcompile.passes.checks.capacity import Agreement
from memcompile.passes.checks.captured_memory import names_by_identity
from memcompile.runtime.distributed.collective_errors import named_collectives
from memcompile.runtime.pool import MemoryPool


@dataclasses.dataclass(frozen=True)
class Table:
    """Where a graph has the part of a pool's values, and what that was when it was captured. It does not keep the model
    alive: Dynamo keeps what was compiled as long as that is.
    """

    pool_of: weakref.ref[MemoryPool]
    position: int  # among the inputs
    kind: tuple[torch.dtype, torch.Size, torch.device]

    def now(self) -> torch.Tensor:
        """The part as it is now.

        Raises:
            CaptureError: it was cast or moved since the graph was captured.
        """
        pool = self.pool_of()
        assert pool is not None, "the model that runs is alive"
        table = pool.table.part
        _check_kind(table, self.kind)
        return table


def tables_among(inputs: Sequence[object], pools: Sequence[MemoryPool]) -> list[Table]:
    """Where the parts of sharded values are among the inputs of a graph that was captured just now.

    Raises:
        CaptureError: the values were cast or moved, and the graph has them as they were.
    """
    found: list[Table] = []
    for pool in pools:
        captured = pool.table.part_in_graphs
        kind = _kind(captured)
        owner = names_by_identity({"": [captured]}, inputs)
        found += [Table(weakref.ref(pool), at, kind) for at, value in enumerate(inputs) if id(value) in owner]
        _check_kind(pool.table.part, kind)
    return found


def run_sharded(lowered: Callable[..., Any], tables: list[Table], agreement: Agreement | None) -> Callable[..., Any]:
    """Has a graph run with the values as they are then, and with the capacity on which the ranks agree.

    Args:
        lowered: the compiled graph.
        tables: where the values are among its inputs.
        agreement: None where ranks have equally many tokens, or the same.
    """

    def run(*args: Any) -> Any:
        if is_traced(args[tables[0].position]):
            return lowered(*args)  # DDP, which asks for the strides of the outputs to compile the next bucket's graph
        given = list(args)
        for table in tables:
            given[table.position] = table.now()
        with named_collectives("forward"):
            if agreement is not None:
                device = given[tables[0].position].device
                agreement.fill_in(given, most_tokens(agreement.most_tokens(args), agreement.group, device))
            return lowered(*given)

    return run


def _kind(table: torch.Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return table.dtype, table.shape, table.device


def _check_kind(table: torch.Tensor, captured: tuple[torch.dtype, torch.Size, torch.device]) -> None:
    if _kind(table) != captured:
        dtype, shape, device = captured
        raise CaptureError(
            f"the memory's values are {table.dtype} {list(table.shape)} on {table.device} now, and were {dtype} "
            f"{list(shape)} on {device} when the model was compiled: cast and move it before compiling"
        )
