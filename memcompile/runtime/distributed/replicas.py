"""Replicas of a model under DistributedDataParallel: the rows of their sparse gradients are averaged.

DDP is told to leave the values alone, since its reducer adds tables. Here each rank sends the rows that it hit, and
all sum the same rows in the same order, so that the replicas stay equal bit for bit. It happens when a backward ends,
behind DDP's own reduction, and not under `no_sync()`, as there.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memcompile.errors import PlanError
from memcompile.lowering.distributed import collectives
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.gather.table_gather import coalesced
from memcompile.lowering.register.schema import operator
from memcompile.runtime._torch import after_backward, sparse_parts
from memcompile.runtime.distributed.sharded_values import ShardedValues
from memcompile.runtime.pool import MemoryPool, live_pools

FUSED_IN_DDP = (
    "values_grad='fused' updates the values of each replica by its own gradient: for DDP plan with values_grad='sparse'"
)


class Replicas:
    """The DDP that a model is in.

    Attributes:
        wait: whether DDP's last forward asks for a reduction that has not been: a backward of the bare module, or under
            `no_sync()`, is none of the other ranks'.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = weakref.ref(ddp)
        self.wait = False
        ddp.register_forward_pre_hook(self._before_forward)

    @property
    def ddp(self) -> DistributedDataParallel | None:
        return self._ddp()

    def _before_forward(self, ddp: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():  # an evaluation between a forward and its backward changes nothing
            self.wait = bool(ddp.require_backward_grad_sync)


def install_replica_hook() -> None:
    """Has every DDP that is built around planned models average their rows. Idempotent."""
    original = DistributedDataParallel.__init__
    if hasattr(original, "_memcompile_replicas"):
        return

    @functools.wraps(original)
    def build(self: DistributedDataParallel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        pools = _pools_left_alone(module)
        if any(pool.sharded is not None and pool.sharded.tokens == "shared" for pool in pools):
            raise PlanError(
                "DDP takes no DTensors, and tensor parallelism (tokens='shared') cuts gates and output projections "
                "into some: fully_shard(model, mesh=mesh['replicate']) averages over the replicas"
            )
        _leave_alone(module, pools)
        original(self, module, *args, **kwargs)
        for pool in pools:
            pool.replicas = Replicas(self)
            if pool.sharded is None:
                first = dist.get_global_rank(self.process_group, 0)
                dist.broadcast(pool.values.detach(), first, group=self.process_group)
            else:
                _check_covered(self, pool.sharded)

    build._memcompile_replicas = True  # type: ignore[attr-defined]
    DistributedDataParallel.__init__ = build  # type: ignore[method-assign]


def average_after_backward(pool: MemoryPool) -> None:
    """Has the values' gradient averaged over the replicas when the backward that is running ends.

    Raises:
        PlanError: under DDP's `join()`.
    """
    replicas = pool.replicas
    ddp = replicas.ddp if replicas is not None and replicas.wait else None
    if ddp is not None and ddp._join_config.enable:
        raise PlanError(
            "DDP's join() lets ranks stop early, and rows are averaged among all: plan with values_grad='dense'"
        )
    if pool.sharded is None:
        group = None if ddp is None else ddp.process_group
    else:  # without DDP, FSDP or the loop averages the rest, and each gradient of ours is averaged as it comes
        group = pool.sharded.replicas if ddp is not None or replicas is None else None
    if group is None:
        return

    def average() -> None:
        if replicas is not None:
            replicas.wait = False
        grad = pool.table_grad
        if grad is not None and grad.is_sparse:
            pool.table_grad = _average(pool, grad, group)
        elif grad is not None and pool.sharded is not None:
            dist.all_reduce(grad, group=group)
            grad.div_(dist.get_world_size(group))

    after_backward(average)


def _average(pool: MemoryPool, grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows, sums = sparse_parts(grad)
    ranks = dist.get_world_size(group)
    # A rank that has brought all rows up to date, to save them, has other bits than one that will do so row by row.
    moved = pool.stepper is not None and pool.stepper.moved_all
    mine = torch.tensor([rows.shape[1], moved], device=rows.device)
    counts, moves = _gathered(mine.unsqueeze(0), 1, ranks, group).cpu().unbind(1)
    if bool(moves.any()) and pool.stepper is not None:
        pool.stepper.catch_up()
        pool.stepper.moved_all = False
    most = int(counts.max())
    all_rows = _gathered(rows[0], most, ranks, group)
    all_sums = _gathered(sums, most, ranks, group)
    valid = torch.cat([torch.arange(count) + rank * most for rank, count in enumerate(counts.tolist())])
    valid = valid.to(rows.device)
    share = torch.full((len(valid), 1), 1 / ranks, device=rows.device, dtype=sum_dtype(sums))
    rows, sums = operator("row_sums")(all_rows[valid].unsqueeze(1), share, all_sums[valid], grad.shape[0])
    return coalesced(rows, sums, grad.shape[0])


def _gathered(tensor: Tensor, most: int, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """The tensors [n, ...] of all ranks, each at the start of its own [most, ...]."""
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return collectives.all_gather(padded, ranks, group.group_name)


def _pools_left_alone(module: nn.Module) -> list[MemoryPool]:
    inside = set(module.modules())
    planned = [pool for pool in live_pools() if pool.root in inside]
    pools = [pool for pool in planned if pool.values_grad != "dense" or pool.sharded is not None]
    if any(pool.config.gradient == "fused" for pool in pools):
        raise PlanError(FUSED_IN_DDP)
    return pools


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
