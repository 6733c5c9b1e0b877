"""Which parameters of a memory no optimizer holds: they are trainable, get gradients, and do not learn. It is told at
the plan, where the model has an optimizer then, and in the first step of an optimizer of the model. So is a memory that
is frozen with the random numbers that it was drawn with.
"""

import collections
import logging
import weakref
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from memcompile.common.sites import LAYER_NAME, VALUES_NAME
from memcompile.runtime.optimizer_state import parameters_of
from memcompile.runtime.table.table import ValueTable, live_tables, values_of
from memcompile.runtime.wrappers import live_optimizers

log = logging.getLogger(__name__)

_asked: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[ValueTable]] = weakref.WeakKeyDictionary()
_told: weakref.WeakSet[ValueTable] = weakref.WeakSet()  # in a step
_holders: weakref.WeakKeyDictionary[ValueTable, weakref.WeakSet[Optimizer]] = (
    weakref.WeakKeyDictionary()
)  # when last seen


def parameters_of_memory(table: ValueTable) -> dict[str, nn.Parameter]:
    """The table and the parameters of its layers, by their names in the model that was planned."""
    if values_of(table) is None:
        return {}
    layers = [m for m in table.owner.modules() if getattr(m.__dict__.get("pool"), "table", None) is table]
    own = {id(p) for layer in layers for p in layer.parameters()} | {id(table.values)}
    model = table.model() or table.owner
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def untrained(table: ValueTable) -> list[str]:
    """The names of the memory's trainable parameters that no live optimizer holds."""
    trainable = {name: p for name, p in parameters_of_memory(table).items() if p.requires_grad}
    missing = _not_in(_holders.get(table, ()), trainable)
    if missing:
        ids = {id(p) for p in trainable.values()}
        holders = [o for o in live_optimizers() if any(id(p) in ids for p in parameters_of(o))]
        _holders[table] = weakref.WeakSet(holders)
        missing = _not_in(holders, trainable)
    return missing


def _not_in(optimizers: Iterable[Optimizer], parameters: dict[str, nn.Parameter]) -> list[str]:
    held = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    return [name for name, p in parameters.items() if id(p) not in held]


def in_words(names: Iterable[str]) -> str:
    """Names of a memory's parameters in few words: "memory_values and 14 parameters of 2 layers (blocks.0, ...)"."""
    tables, layers = [], collections.Counter[str]()
    for name in names:
        path, _, last = name.rpartition(".")
        if last == VALUES_NAME:
            tables.append(name)
        else:
            layers[path.removesuffix(LAYER_NAME).rstrip(".")] += 1
    if layers:
        paths = [*layers] if len(layers) <= 4 else [next(iter(layers)), "...", next(reversed(layers))]
        counted = [f"{n} {word}{'s' * (n > 1)}" for n, word in ((layers.total(), "parameter"), (len(layers), "layer"))]
        tables.append(f"{' of '.join(counted)} ({', '.join(paths)})")
    return " and ".join(tables)


def tell_at_plan(table: ValueTable, optimizers: Iterable[Optimizer], for_matrices: Sequence[str]) -> None:
    """Warns of parameters that no optimizer holds when the model is planned.

    Args:
        optimizers: those of the model.
        for_matrices: the classes of those that have groups for matrices alone.
    """
    _holders[table] = weakref.WeakSet(optimizers)
    missing = untrained(table)
    if missing:
        reason = "".join(f"{name} takes matrices alone. " for name in for_matrices)
        log.warning(
            "memcompile: no optimizer holds parameters of the memory: %s. %s%s", in_words(missing), reason, _FIX
        )


def tell_in_step(optimizer: Optimizer) -> None:
    """Warns, once for each table, where an optimizer of its model steps, and no optimizer holds parameters of the
    memory, which get gradients; or all of them are frozen as they were drawn.
    """
    asked = _asked.setdefault(optimizer, weakref.WeakSet())
    for table in live_tables:
        values = values_of(table)
        if table in asked or values is None or (values.requires_grad and values.grad is None):
            continue  # asked when it has a gradient
        asked.add(table)
        model = {id(p) for p in (table.model() or table.owner).parameters()}
        if table in _told or not any(id(p) in model for p in parameters_of(optimizer)):
            continue
        missing = untrained(table)
        if missing:
            told = f"no optimizer holds parameters of its memory: {in_words(missing)}. {_FIX}"
        elif _is_frozen_as_drawn(table):
            told = (
                "its memory is frozen with the random numbers that it was drawn with. Make its parameters trainable, "
                "which memory in their names tells, or load a checkpoint"
            )
        else:
            continue
        _told.add(table)
        log.warning("memcompile: %s.step() trains a model, and %s", type(optimizer).__name__, told)


def _is_frozen_as_drawn(table: ValueTable) -> bool:
    trainable = any(p.requires_grad for p in parameters_of_memory(table).values())
    return not trainable and table.drawn == table.part._version


_FIX = "They do not learn: give them to an optimizer, or freeze them by requires_grad_(False)"
