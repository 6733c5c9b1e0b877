"""What is around a model: compiled modules, data parallelism, sharding, and optimizers."""

import gc
from typing import TypeVar

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from memcompile.errors import PlanError
from memcompile.runtime._torch import OptimizedModule

T = TypeVar("T")


def unwrap(model: nn.Module) -> tuple[nn.Module, list[DistributedDataParallel]]:
    """The model inside ``torch.compile``, DDP and DataParallel wrappers, and the DDP wrappers met."""
    ddp = []
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (DistributedDataParallel, DataParallel)):
            if isinstance(model, DistributedDataParallel):
                ddp.append(model)
            elif len(model.device_ids) > 1:
                raise PlanError(
                    "nn.DataParallel copies the model at each step, which a memory does not survive: use DDP"
                )
            model = model.module
        else:
            return model, ddp


def is_in_ddp(root: nn.Module) -> bool:
    """Whether some DistributedDataParallel of this process wraps the model, of which it knows nothing itself."""

    def found() -> bool:
        return any(getattr(ddp, "module", None) is root for ddp in live_objects(DistributedDataParallel))

    if not found():
        return False
    gc.collect()  # one that was dropped, and is only reached by itself
    return found()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or tensor parallelism already split the model's parameters."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    sharded_modules = any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules())
    return sharded_modules or any(isinstance(p, DTensor) for p in model.parameters())


def live_objects(kind: type[T]) -> list[T]:
    """All of a class, and of classes derived from it."""
    # type(o), not isinstance: a lazy proxy's __class__ may import half a library
    return [o for o in gc.get_objects() if issubclass(type(o), kind)]


def live_optimizers() -> list[Optimizer]:
    """Every optimizer of the process that has groups: some are wrappers, or half built."""
    return [optimizer for optimizer in live_objects(Optimizer) if hasattr(optimizer, "param_groups")]
