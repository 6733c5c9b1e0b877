"""The pool: one table of values that every memory layer of a model reads, registered once, on the model itself."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memcompile.common.sites import VALUES_NAME, FfnSite
from memcompile.config import MemoryConfig
from memcompile.runtime._torch import local_part

if TYPE_CHECKING:
    from memcompile.runtime.distributed.replicas import Replicas
    from memcompile.runtime.distributed.sharded_values import ShardedValues
    from memcompile.runtime.layer import MemoryLayer
    from memcompile.runtime.values_stepper import ValuesReader

_POOL_ATTRIBUTE = "_memcompile_pool"


@dataclasses.dataclass(eq=False)
class MemoryPool:
    """What a planned model knows of its memory.

    The values are a parameter of the root, so that ``root.parameters()`` and ``state_dict()`` hold them once
    under a stable name, wherever the layers that read them sit. The pool reads them through the root at each
    use: ``load_state_dict(assign=True)``, ``to_empty`` and sharding replace parameters.

    Attributes:
        root: the planned model.
        config: the options, with every size resolved (None only for ``values_lr``).
        requested: the options as the user gave them.
        sites: every FFN that was found, in execution order, refused ones included.
        layers: the memory layer of each chosen FFN, by the name of its down-projection's weight.
        removed_parameters: how many numbers the replaced FFNs held; none left where the memory is added.
        stepper: who steps the values by rows, and reads them; None until an optimizer does.
        replicas: the DDP that the model is in, where it is in one and the gradient of the values is sparse.
        sharded: how the values lie on a mesh; None where each process has all of them.
    """

    root: nn.Module
    config: MemoryConfig
    requested: MemoryConfig
    sites: tuple[FfnSite, ...]
    layers: dict[str, MemoryLayer] = dataclasses.field(default_factory=dict)
    removed_parameters: int = 0
    stepper: ValuesReader | None = None
    replicas: Replicas | None = None
    sharded: ShardedValues | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A filter may be a lambda, which cannot be pickled; the config names the blocks that it chose. A copy is in
        no optimizer and no DDP yet, so its rows are up to date; `attach` has the pool copied before the values.
        """
        self.catch_up()
        requested = self.requested
        if callable(requested.memory_layers):
            requested = dataclasses.replace(requested, memory_layers=self.config.memory_layers)
        return {**self.__dict__, "requested": requested, "stepper": None, "replicas": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy or an unpickled model is a planned model of its own."""
        self.__dict__.update(state)
        _LIVE.add(self)

    @property
    def adds(self) -> bool:
        """Whether the FFNs stay and the memory is added to their outputs."""
        return self.config.placement == "add"

    @property
    def values(self) -> nn.Parameter:
        """The table [n_keys**2, value_dim]; a DTensor where it is sharded."""
        return getattr(self.root, VALUES_NAME)

    @property
    def table(self) -> nn.Parameter:
        """What this process holds of the values: what layers read, and what optimizers for rows step."""
        return self.values if self.sharded is None else self.sharded.part(self.values)

    @property
    def table_in_graphs(self) -> nn.Parameter:
        """The same for Dynamo, which can neither trace how it is kept up to date (that is done before a graph runs) nor
        take a DTensor that has a sparse gradient.
        """
        return self.values if self.sharded is None or self.sharded.own is None else self.sharded.own

    @property
    def table_grad(self) -> Tensor | None:
        """The gradient of `table`, which is what this process holds of `values.grad`."""
        return None if self.values.grad is None else local_part(self.values.grad)

    @table_grad.setter
    def table_grad(self, grad: Tensor | None) -> None:
        self.values.grad = grad if self.sharded is None or grad is None else self.sharded.whole(grad, self.values)

    def attach(self, values: nn.Parameter) -> None:
        """Registers the values on the root; from here on the model is planned."""
        self.root.register_parameter(VALUES_NAME, values)
        others = dict(vars(self.root))
        vars(self.root).clear()
        vars(self.root).update({_POOL_ATTRIBUTE: self, **others})  # copy and pickle go through them in this order
        _LIVE.add(self)

    @property
    def values_grad(self) -> str:
        """What gradient the values get: as planned where they are a parameter of the root's own, not a parametrization
        or FSDP's view of a shard, and of a dtype that optimizers for rows step; else dense.
        """
        fsdp = self.sharded is None and hasattr(type(self.root), "set_requires_gradient_sync")
        values = self.table_in_graphs if torch.compiler.is_compiling() else self.values
        alone = isinstance(values, nn.Parameter) and not fsdp
        return self.config.gradient if alone and values.dtype is not torch.float16 else "dense"

    def catch_up(self) -> None:
        """Brings all rows of the values up to date with the optimizer's last step."""
        if self.stepper is not None:
            self.stepper.catch_up()

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The values and the parameters of every memory layer, by their full names in the model."""
        own = {id(self.values)} | {id(p) for layer in self.layers.values() for p in layer.parameters()}
        return ((name, p) for name, p in self.root.named_parameters() if id(p) in own)

    @property
    def chosen(self) -> list[FfnSite]:
        """The FFNs with memory in their place or beside them, in execution order."""
        return [site for site in self.sites if site.down in self.layers]


_LIVE: weakref.WeakSet[MemoryPool] = weakref.WeakSet()


def live_pools() -> Iterator[MemoryPool]:
    """Every planned model that is alive; what a deep copy that failed half way left behind is none."""
    return (pool for pool in tuple(_LIVE) if pool.root.__dict__.get(_POOL_ATTRIBUTE) is pool)


def pool_of(module: nn.Module) -> MemoryPool | None:
    """The pool of a planned model or of any part of one; None for a model that is not planned."""
    own = module.__dict__.get(_POOL_ATTRIBUTE)
    if own is not None:
        return own
    return next((pool for pool in live_pools() if any(m is module for m in pool.root.modules())), None)


def pools_inside(module: nn.Module) -> list[MemoryPool]:
    """The pools of planned submodules, the module itself excluded."""
    return [m.__dict__[_POOL_ATTRIBUTE] for m in module.modules() if m is not module and _POOL_ATTRIBUTE in m.__dict__]
