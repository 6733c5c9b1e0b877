"""DistributedDataParallel that is built around planned models: it leaves the values to `averaging`."""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memcompile.errors import PlanError
from memcompile.runtime.distributed.averaging import Replicas
from memcompile.runtime.distributed.sharded_values import ShardedValues
from memcompile.runtime.pool import MemoryPool, live_pools


def install_replica_hook() -> None:
    """Has every DDP that is built around planned models average their rows. Idempotent."""
    original = DistributedDataParallel.__init__
    if hasattr(original, "_memcompile_replicas"):
        return

    @functools.wraps(original)
    def build(self: DistributedDataParallel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        pools = _pools_left_alone(module)
        if any(pool.table.sharded is not None and pool.table.sharded.tokens == "shared" for pool in pools):
            raise PlanError(
                "DDP takes no DTensors, and tensor parallelism (tokens='shared') cuts gates and output projections "
                "into some: fully_shard(model, mesh=mesh['replicate']) averages over the replicas"
            )
        _leave_alone(module, pools)
        original(self, module, *args, **kwargs)
        for pool in pools:
            pool.table.replicas = Replicas(self)
            if pool.table.sharded is None:
                first = dist.get_global_rank(self.process_group, 0)
                dist.broadcast(pool.values.detach(), first, group=self.process_group)
            else:
                _check_covered(self, pool.table.sharded)

    build._memcompile_replicas = True  # type: ignore[attr-defined]
    DistributedDataParallel.__init__ = build  # type: ignore[method-assign]


def _pools_left_alone(module: nn.Module) -> list[MemoryPool]:
    inside = set(module.modules())
    tables = [pool for pool in live_pools() if pool.owner in inside]
    return [pool for pool in tables if pool.table.gradient != "dense" or pool.table.sharded is not None]


def _check_covered(ddp: DistributedDataParallel, sharded: ShardedValues) -> None:
    """Raises PlanError where ranks of a DDP would have other values: it leaves them alone."""
    covered = set(sharded.mesh.mesh.flatten().tolist())
    missing = set(dist.get_process_group_ranks(ddp.process_group)) - covered
    if missing:
        raise PlanError(
            f"ranks {sorted(missing)} of this DDP have no part in {sharded.mesh}, over which the memory is sharded, "
            f"and its values would differ there: shard over a mesh of two dimensions, replicas and memory group"
        )


def _leave_alone(module: nn.Module, pools: list[MemoryPool]) -> None:
    values = {id(pool.values) for pool in pools}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in values]
    if names:
        # The reducer calls a parameter of the module's own ".name".
        names += [f".{name}" for name in names]
        ignored = [*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *names]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]
