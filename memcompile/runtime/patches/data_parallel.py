"""`DistributedDataParallel.__init__`: replicas of a planned model leave its values alone, and average their rows.

No public way: DDP has no hook for what it is built around, and its list of parameters to ignore is private. It would
send a whole table, where a gradient is of some rows, and takes no DTensors.
Until: https://github.com/pytorch/pytorch/issues/43690 (an option that ignores parameters).
The same: DDP around a module in which nothing is planned.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memcompile.common.patch import Patch, Replaced
from memcompile.errors import PlanError
from memcompile.runtime.pool import live_pools
from memcompile.runtime.table.gradient import Replicas


def _around_planned(
    build: Callable[..., None], ddp: DistributedDataParallel, module: nn.Module, *args: object, **kwargs: object
) -> None:
    inside = set(module.modules())
    planned = [pool for pool in live_pools() if pool.owner in inside]
    pools = [pool for pool in planned if pool.table.gradient != "dense" or pool.table.sharded is not None]
    if any(pool.table.sharded is not None and pool.table.sharded.tokens == "shared" for pool in pools):
        raise PlanError(
            "DDP takes no DTensors, and tensor parallelism (tokens='shared') cuts gates and output projections "
            "into some: fully_shard(model, mesh=mesh['replicate']) averages over the replicas"
        )
    values = {id(pool.values) for pool in pools}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in values]
    if names:  # the reducer calls a parameter of the module's own ".name"
        ignored = [*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *names, *(f".{name}" for name in names)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]
    build(ddp, module, *args, **kwargs)
    for pool in pools:
        pool.table.replicas = Replicas(ddp)
        if pool.table.sharded is None:
            dist.broadcast(pool.values.detach(), group=ddp.process_group, group_src=0)
            continue
        mesh = pool.table.sharded.mesh
        missing = set(dist.get_process_group_ranks(ddp.process_group)) - set(mesh.mesh.flatten().tolist())
        if missing:
            raise PlanError(
                f"ranks {sorted(missing)} of this DDP have no part in {mesh}, over which the memory is sharded, "
                f"and its values would differ there: shard over a mesh of two dimensions, replicas and memory group"
            )


PATCH = Patch(Replaced(DistributedDataParallel, "__init__", _around_planned))
