"""MemoryPool: what a planned model knows of its memory, and how it is found."""

from __future__ import annotations

import copy
import dataclasses
import logging
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from memcompile.common.sites import LAYER_NAME, VALUES_NAME, FfnSite
from memcompile.config import MemoryConfig
from memcompile.errors import OptionError, PlanError
from memcompile.lowering.parameters import values_shape
from memcompile.runtime import patches
from memcompile.runtime.table.hit_counts import HitCounts
from memcompile.runtime.table.hooks import watch_optimizers
from memcompile.runtime.table.table import ValueTable
from memcompile.runtime.wrappers import unwrap

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

log = logging.getLogger(__name__)

_POOL_ATTRIBUTE = "_memcompile_pool"


@dataclasses.dataclass(eq=False)
class MemoryPool:
    """The plan of one memory, its layers, and the table that they read.

    Attributes:
        owner: the lowest module with a forward of its own that contains all of the layers. The values are a parameter
            of it, so that whoever saves, optimises, copies or loads it has the table.
        prefix: what names of the planned model start with, to which those of the owner are relative: "" or "model.".
        config: the options, with every size resolved (None only for ``values_lr``); layers are named from the owner.
        requested: the options as the user gave them.
        width: of the layers; of the widest where they differ.
        sites: every FFN that was found in the planned model, in execution order, refused ones included; named from it.
        table: the values, and the state of their rows.
        layers: the memory layer of each chosen FFN, by the name that its down-projection's weight has from the owner.
        removed_parameters: how many numbers the replaced FFNs held; none left where the memory is added.
        counts: of the hits of its layers, while they are counted.
    """

    owner: nn.Module
    prefix: str
    config: MemoryConfig
    requested: MemoryConfig
    width: int
    sites: tuple[FfnSite, ...]
    layers: dict[str, MemoryLayer] = dataclasses.field(default_factory=dict)
    removed_parameters: int = 0
    counts: HitCounts | None = None
    table: ValueTable = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.table = ValueTable(self.owner, self.config)

    def __getstate__(self) -> dict[str, Any]:
        """A filter may be a lambda, which cannot be pickled; the config names the blocks that it chose."""
        requested = self.requested
        if callable(requested.memory_layers):
            requested = dataclasses.replace(requested, memory_layers=self.config.memory_layers)
        return {**self.__dict__, "requested": requested}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy or an unpickled model is a planned model of its own."""
        self.__dict__.update(state)
        patches.hold(self)
        _LIVE.add(self)
        watch_optimizers(self.table)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryPool:
        """Of a part of the model alone, which goes on reading this table."""
        if id(self.owner) not in memo:
            told(self, "copied")
            return self
        copied = memo[id(self)] = object.__new__(MemoryPool)
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = memo.get(id(self.table.model()))  # the copy of the model that was planned, where that is copied
        if isinstance(model, nn.Module):
            copied.table.model = weakref.ref(model)
        return copied

    @property
    def adds(self) -> bool:
        """Whether the FFNs stay and the memory is added to their outputs."""
        return self.config.placement == "add"

    @property
    def values(self) -> nn.Parameter:
        """The table, of `values_shape`; a DTensor where it is sharded."""
        return self.table.values

    @property
    def values_shape(self) -> tuple[int, int]:
        """[slots of all layers, numbers of a row]."""
        return values_shape(self.config, self.width)

    def attach(self, values: nn.Parameter) -> None:
        """Registers the values on the owner; from here on the model is planned."""
        self.owner.register_parameter(VALUES_NAME, values)
        others = dict(vars(self.owner))
        vars(self.owner).clear()
        # Copy and pickle go through them in this order: the table flushes its rows before the values are copied.
        vars(self.owner).update({_POOL_ATTRIBUTE: self, **others})
        self.table.watch_gradient()
        watch_optimizers(self.table)
        if not self.config.frozen:
            self.table.drawn = self.table.part._version
        _LIVE.add(self)

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The values and the parameters of every memory layer, by their full names from the owner."""
        own = {id(self.values)} | {id(p) for down in self.layers for p in self.layer_parameters(down)}
        return ((name, p) for name, p in self.owner.named_parameters() if id(p) in own)

    def layer_parameters(self, down: str) -> list[nn.Parameter]:
        """The parameters of a layer, and of what is registered in its place: a wrapper may run a copy of it."""
        layer = self.layers[down]
        try:
            registered = self.owner.get_submodule(f"{down.rpartition('.')[0]}.{LAYER_NAME}".lstrip("."))
        except AttributeError:  # a wrapper around the projection has changed the names
            registered = layer
        return list(dict.fromkeys([*layer.parameters(), *registered.parameters()]))

    @property
    def chosen(self) -> list[FfnSite]:
        """The FFNs with memory in their place or added to them, in execution order, named from the planned model."""
        return [site for site in self.sites if site.down.removeprefix(self.prefix) in self.layers]


_LIVE: weakref.WeakSet[MemoryPool] = weakref.WeakSet()


def live_pools() -> Iterator[MemoryPool]:
    """Every planned model that is alive; what a deep copy that failed half way left is none."""
    return (pool for pool in tuple(_LIVE) if pool.owner.__dict__.get(_POOL_ATTRIBUTE) is pool)


def pool_of(module: nn.Module) -> MemoryPool | None:
    """The pool of a planned model, of any part of one, or of what wraps one; None for a model that is not planned, or
    of which several parts are.
    """
    own = module.__dict__.get(_POOL_ATTRIBUTE)
    if own is not None:
        return own
    inside = pools_inside(module)
    if inside:
        return inside[0] if len(inside) == 1 else None
    return next((pool for pool in live_pools() if any(m is module for m in pool.owner.modules())), None)


def memory_of(model: nn.Module) -> MemoryPool:
    """The pool of a planned model, of a part of one, or of what wraps one, `torch.compile` and DDP included.

    Raises:
        OptionError: it is no module.
        PlanError: it has no memory.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected an nn.Module, got {model!r}")
    pool = pool_of(unwrap(model)[0])
    if pool is None:
        raise PlanError(f"{type(model).__name__} has no memory: plan it first")
    return pool


def pools_inside(module: nn.Module) -> list[MemoryPool]:
    """The pools of planned submodules, the module itself excluded."""
    return [m.__dict__[_POOL_ATTRIBUTE] for m in module.modules() if m is not module and _POOL_ATTRIBUTE in m.__dict__]


def told(pool: MemoryPool, what: str) -> None:
    """Warns, once for each table, that a part of a model is saved or copied without it."""
    if what not in _TOLD.setdefault(pool, set()):
        _TOLD[pool].add(what)
        log.warning(
            "memcompile: a part of a model is %s that has memory layers, but not their table, %s.%s, which is not %s "
            "with it. Take the whole %s",
            what,
            type(pool.owner).__name__,
            VALUES_NAME,
            what,
            type(pool.owner).__name__,
        )


_TOLD: weakref.WeakKeyDictionary[MemoryPool, set[str]] = weakref.WeakKeyDictionary()
