"""Every table of the process, and which optimizers hold them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim import Optimizer

from memcompile.common.sites import VALUES_NAME
from memcompile.runtime.table.table import ValueTable

live_tables: weakref.WeakSet[ValueTable] = weakref.WeakSet()


def tables_in(optimizer: Optimizer) -> list[tuple[ValueTable, dict[str, Any]]]:
    """The tables whose values an optimizer holds, each with its group."""
    mine = {}
    for table in live_tables:
        # A deep copy that failed half way has none, or not even parameters.
        values = table.owner.__dict__.get("_parameters", {}).get(VALUES_NAME)
        if values is not None:
            mine[id(values)] = table
    groups = getattr(optimizer, "param_groups", ())
    return [(mine[id(p)], group) for group in groups for p in group["params"] if id(p) in mine]


@torch.compiler.assume_constant_result
def flush_while_traced(name: str) -> bool:
    """Flushes the table of this name when a program is traced, and not when it runs."""
    for table in live_tables:
        if table.name == name:
            table.flush()
    return True
