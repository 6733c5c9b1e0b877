"""What happens around each run of a compiled graph that reads sharded values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from memcompile.errors import CaptureError
from memcompile.lowering.sharded_table import most_tokens
from memcompile.runtime.pool import MemoryPool


class Agreement(Protocol):
    """As `passes.capacity` has it."""

    @property
    def group(self) -> str: ...

    @property
    def place(self) -> int: ...

    def most(self, inputs: Sequence[Any]) -> int: ...


def run_sharded(
    lowered: Callable[..., Any], inputs: Sequence[object], pools: Sequence[MemoryPool], agreement: Agreement | None
) -> Callable[..., Any]:
    """A graph that is run with the values as they are by then, and with the capacity on which the ranks agree.

    Args:
        lowered: the compiled graph.
        inputs: those that it was compiled with.
        pools: whose values may be among them.
        agreement: None where ranks have equally many tokens, or the same.
    """
    tables = [(pool, at) for pool in pools for at, value in enumerate(inputs) if value is pool.table]

    def run(*args: Any) -> Any:
        given = list(args)
        for pool, at in tables:
            given[at] = _as_compiled(pool.table, args[at])
        if agreement is not None:
            device = pools[0].table.device
            given[agreement.place] = most_tokens(agreement.most(args), agreement.group, device)
        return lowered(*given)

    return run


def _as_compiled(table: torch.Tensor, compiled: torch.Tensor) -> torch.Tensor:
    if table.dtype != compiled.dtype or table.shape != compiled.shape or table.device != compiled.device:
        raise CaptureError(
            f"the memory's values are {table.dtype} {list(table.shape)} on {table.device} now, and were "
            f"{compiled.dtype} {list(compiled.shape)} on {compiled.device} when the model was compiled: cast and move "
            f"it before compiling"
        )
    return table
