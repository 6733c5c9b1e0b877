"""The gradient of the values when autograd has added it up: coalesced, and averaged over replicas.

DistributedDataParallel is told to leave the values alone, since its reducer adds tables. Here each rank sends the rows
that it hit, and all sum the same rows in the same order, so that the replicas stay equal bit for bit. It happens when a
backward ends, after DDP's own reduction, and not under `no_sync()`, as there.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from memcompile.errors import PlanError
from memcompile.lowering.distributed import collectives
from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.gather.table_gather import coalesced
from memcompile.lowering.register.schema import operator
from memcompile.runtime._torch import after_backward, sparse_parts
from memcompile.runtime.table.touched_rows import touched_rows

if TYPE_CHECKING:
    from memcompile.runtime.table.table import ValueTable

_watched: Any = WeakTensorKeyDictionary()  # not an attribute: a parameter is pickled with those


def watch_gradient(table: ValueTable) -> None:
    """Sees every gradient that the values get from here on. Idempotent: values that were replaced are watched anew."""
    part, of = table.part, weakref.ref(table)
    dense = table.gradient == "dense" and table.sharded is None
    if dense or not part.requires_grad or part in _watched:
        return

    def hook(parameter: Tensor) -> None:
        table, grad = of(), parameter.grad
        if table is not None and grad is not None:
            _added_up(table, parameter, grad)

    _watched[part] = part.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _added_up(table: ValueTable, part: Tensor, grad: Tensor) -> None:
    if part is not table.part:  # other values that were read in the place of the table's, inside `functional_call`
        part.grad = sum_of_rows(grad) if grad.is_sparse else grad
        return
    if table.sharded is not None:  # a part, whose gradient joins that of the whole
        part.grad, before = None, table.grad
        grad = grad if before is None else before + grad if before.is_sparse else before.add_(grad)
    table.grad = sum_of_rows(grad) if grad.is_sparse else grad
    _average_after_backward(table)
    if table.sharded is not None:
        for hook in (table.values._post_accumulate_grad_hooks or {}).values():  # autograd knows the part alone
            hook(table.values)


def sum_of_rows(grad: Tensor) -> Tensor:
    """The same gradient, coalesced: autograd forgets that one is, and on some devices adds two by appending them."""
    return coalesced(*touched_rows(grad, grad.dtype), num_slots=grad.shape[0])


class Replicas:
    """The DDP that a model is in.

    Attributes:
        wait: whether DDP's last forward asks for a reduction that has not been: a backward of the bare module, or under
            `no_sync()`, is none of the other ranks'.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = weakref.ref(ddp)
        self.wait = False
        self._own_group: dist.ProcessGroup | None = None
        ddp.register_forward_pre_hook(self._before_forward)

    @property
    def ddp(self) -> DistributedDataParallel | None:
        return self._ddp()

    @property
    def group(self) -> dist.ProcessGroup:
        """The group to average over: DDP's, or one of the same ranks beside a hook of the user's, whose own collectives
        may come in another order among ours on each rank.
        """
        ddp = self.ddp
        assert ddp is not None, "a backward of its module runs"
        return self._own_group or ddp.process_group  # type: ignore[no-any-return]

    def _before_forward(self, ddp: Any, args: Any) -> None:
        if ddp._comm_hooks and self._own_group is None:
            ranks = dist.get_process_group_ranks(ddp.process_group)
            self._own_group = dist.new_group(ranks, use_local_synchronization=True)
        if torch.is_grad_enabled():  # an evaluation between a forward and its backward changes nothing
            self.wait = bool(ddp.require_backward_grad_sync)


def _average_after_backward(table: ValueTable) -> None:
    """Has the values' gradient averaged over the replicas when the backward that is running ends."""
    replicas = table.replicas
    ddp = replicas.ddp if replicas is not None and replicas.wait else None
    if ddp is not None and ddp._join_config.enable:
        raise PlanError(
            "DDP's join() lets ranks stop early, and rows are averaged among all: plan with values_grad='dense'"
        )
    if table.sharded is None:
        group = None if ddp is None or replicas is None else replicas.group
    else:  # without DDP, FSDP or the loop averages the rest, and each gradient of ours is averaged as it comes
        group = table.sharded.replicas if ddp is not None or replicas is None else None
    if group is None:
        return

    def average() -> None:
        if replicas is not None:
            replicas.wait = False
        grad = table.grad
        if grad is not None and grad.is_sparse:
            table.grad = _average(table, grad, group)
        elif grad is not None and table.sharded is not None:
            dist.all_reduce(grad, group=group)
            grad.div_(dist.get_world_size(group))

    after_backward(average)


def _average(table: ValueTable, grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows, sums = sparse_parts(grad)
    ranks = dist.get_world_size(group)
    # A rank that has flushed all rows, to save them, has other bits than one that will flush them row by row.
    mine = torch.tensor([rows.shape[1], table.flushed], device=rows.device)
    counts, flushed = _gathered(mine.unsqueeze(0), 1, ranks, group).cpu().unbind(1)
    if bool(flushed.any()):
        table.flush()
        table.flushed = False
    most = int(counts.max())
    all_rows = _gathered(rows[0], most, ranks, group)
    all_sums = _gathered(sums, most, ranks, group)
    counted = enumerate(counts.tolist())
    valid = torch.cat([torch.arange(count, device=rows.device) + rank * most for rank, count in counted])
    share = torch.full((len(valid), 1), 1 / ranks, device=rows.device, dtype=sum_dtype(sums))
    rows, sums = operator("row_sums")(all_rows[valid].unsqueeze(1), share, all_sums[valid], grad.shape[0])
    return coalesced(rows, sums, grad.shape[0])


def _gathered(tensor: Tensor, most: int, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """The tensors [n, ...] of all ranks, each at the start of its own [most, ...]."""
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return collectives.all_gather(padded, ranks, group.group_name)
