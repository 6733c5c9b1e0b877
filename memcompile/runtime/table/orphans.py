"""Tables that no optimizer holds, while one steps their layers: it is told, once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from memcompile.runtime.live_objects import live_objects

if TYPE_CHECKING:
    from memcompile.runtime.table.table import ValueTable

log = logging.getLogger(__name__)

_asked: Any = weakref.WeakSet()  # optimizers


def tell_orphans(optimizer: Optimizer, tables: Iterable[ValueTable]) -> None:
    """Warns where an optimizer without any table steps layers of one, and no other optimizer holds that table."""
    if optimizer in _asked:
        return
    _asked.add(optimizer)
    stepped = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    for table in tables:
        layers = [p for layer in table.layers() for p in layer.parameters()]
        if table.values.requires_grad and any(id(p) in stepped for p in layers) and not _is_held(table):
            log.warning(
                "memcompile: %s steps memory layers, but no optimizer holds their table, %s.memory_values: it does not "
                "learn. Give the optimizer the parameters of that %s, or freeze the table by requires_grad_(False)",
                type(optimizer).__name__,
                type(table.owner).__name__,
                type(table.owner).__name__,
            )


def _is_held(table: ValueTable) -> bool:
    values = table.values
    found = (optimizer for optimizer in live_objects(Optimizer) if hasattr(optimizer, "param_groups"))
    return any(p is values for optimizer in found for group in optimizer.param_groups for p in group["params"])
