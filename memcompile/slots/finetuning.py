"""Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): of each batch, only the slots learn that it hits
unusually often.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memcompile.errors import OptionError, PlanError
from memcompile.lowering.gather.table_gather import coalesced
from memcompile.runtime.distributed.ddp import check_rebuildable, rebuild
from memcompile.runtime.pool import MemoryPool, memory_of
from memcompile.runtime.table.table import ValueTable
from memcompile.runtime.table.touched_rows import touched_rows
from memcompile.runtime.wrappers import unwrap
from memcompile.slots.background import Background, background_of, put_background
from memcompile.slots.counting import Run, counted, each_with_progress, evaluating, run_batch


@contextlib.contextmanager
def finetune_slots(
    model: nn.Module, *, top_t: int, background: Iterable[Any] | None = None, run: Run = run_batch
) -> Iterator[None]:
    """In a block, each step of the user's optimizer moves only the slots that stand out in its batch.

    Let c_i be how often the tokens since the last step hit slot i, B how many batches of the background there were, and
    b_i in how many of them slot i was hit. The slots of the `top_t` highest scores

        c_i / sum_j c_j * log((B + 1) / (b_i + 1))

    keep their gradient, of those that were hit; of equal ones the lower slot. The gradient of all others is zero, and
    the table has no weight decay. A momentum from earlier steps of the block goes on, under rules that have one.
    Forwards under `no_grad` do not count.

    The user's loop stays as it is. All other parameters of the model are frozen in the block: they have no gradient,
    and optimizers skip them. Afterwards they are trainable as before.

        with memcompile.finetune_slots(model, background=old_batches, top_t=500):
            for batch in new_batches: ...

    Where ranks train one model (DDP, a sharded table), each has its own batches, hits are summed over the ranks, and
    all move the same slots.

    Args:
        model: a planned model, or what wraps one; the DDP, where there is one.
        top_t: how many slots a step moves.
        background: batches of what the model is to keep. They are run once, in eval mode, and how many of them hit each
            slot is kept in the model: `state_dict()` has it under `memory_background_hits`, and a later call takes
            None. Batches that are given replace it.
        run: calls the model with a batch. By default a tensor or a tuple is positional arguments, a dict keywords.

    Raises:
        OptionError: `top_t` is no positive number, or there is no background.
        PlanError: the model has no memory, its table does not learn, such a block is open already, or the model is in
            a DDP whose table has a sparse gradient, or with options that it cannot be built with a second time.
    """
    pool = memory_of(model)
    if not isinstance(top_t, int) or isinstance(top_t, bool) or top_t < 1:
        raise OptionError(f"top_t must be a positive number of slots, got {top_t!r}")
    table = pool.table
    if pool.config.frozen:
        raise PlanError("the values lie in a file or on the host, for inference: plan with values_storage='device'")
    if table.row_filter is not None:
        raise PlanError(f"a block of finetune_slots for {type(model).__name__} is open already: leave it first")
    parallel = unwrap(model)[1]
    if parallel and table.gradient == "sparse":
        raise PlanError(
            "DDP reduces no sparse gradient, and in a block of finetune_slots nothing else learns: plan with "
            "values_grad='dense', or share the table by memcompile.shard() without DDP"
        )
    for ddp in parallel:
        check_rebuildable(ddp, sharded=False)
    groups = _groups_of(pool, parallel)
    if background is not None:
        put_background(pool, _count_background(pool, model, background, run, groups))
    found = background_of(pool)
    if found is None:
        raise OptionError(
            "background: expected batches of what the model is to keep: this model has no counts of such batches yet"
        )
    with _only_the_table(model, table, parallel), counted(pool, for_gradients=True):
        table.row_filter = _Chooser(pool, found, top_t, groups)
        try:
            yield
        finally:
            table.row_filter = None


def _groups_of(pool: MemoryPool, parallel: Sequence[DistributedDataParallel]) -> list[dist.ProcessGroup]:
    """The groups of ranks over which hits are summed, one after the other."""
    sharded = pool.table.sharded
    if sharded is not None:
        memory = [] if sharded.shards.same_tokens else [sharded.memory_mesh.get_group()]
        return memory + ([sharded.replicas] if sharded.replicas is not None else [])
    return [ddp.process_group for ddp in parallel]


def _count_background(
    pool: MemoryPool, model: nn.Module, batches: Iterable[Any], run: Run, groups: list[dist.ProcessGroup]
) -> Background:
    """How many of the batches hit each slot."""
    with counted(pool) as counts, evaluating(model):
        hits = torch.zeros_like(counts.slot_hits)
        total = hits.new_zeros(())
        for batch in each_with_progress(batches, "background"):
            counts.zero()
            run(model, batch)
            hits += counts.slot_hits > 0
            total += 1
    hits, total = _summed(hits, groups), _summed(total, groups)
    if not hits.any():
        raise OptionError(
            f"background: {int(total)} batches, none of which hit a slot: give batches that the model runs on"
        )
    return Background(hits.int(), int(total))


@contextlib.contextmanager
def _only_the_table(model: nn.Module, table: ValueTable, parallel: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Freezes all parameters of a model but its table; its DDPs wait for the gradients of those that learn."""
    values = table.values
    others = [p for p in model.parameters() if p is not values and p.requires_grad]
    learned = values.requires_grad
    for parameter in others:
        parameter.requires_grad_(False)
        parameter.grad = None
    values.requires_grad_(True)
    for ddp in parallel:
        rebuild(ddp)
    try:
        yield
    finally:
        values.requires_grad_(learned)
        for parameter in others:
            parameter.requires_grad_(True)
        for ddp in parallel:
            rebuild(ddp)


class _Chooser:
    """Chooses the rows of each step, and begins to count anew."""

    def __init__(self, pool: MemoryPool, background: Background, top_t: int, groups: list[dist.ProcessGroup]) -> None:
        self._pool, self._top_t, self._groups = pool, top_t, groups
        hits = background.hits.double()
        self._rarity = torch.log((background.batches + 1) / (hits + 1))  # [slots]

    def __call__(self, grad: Tensor) -> Tensor:
        """The gradient, of the rows that this process has, of which only the chosen rows are left."""
        counts = self._pool.counts
        assert counts is not None
        hits = _summed(counts.slot_hits, self._groups)
        counts.zero()
        hit = hits.nonzero()[:, 0]
        scores = hits[hit].double() * self._rarity.to(hits.device)[hit]  # a common divisor changes no order
        best = hit[scores.sort(descending=True, stable=True).indices[: self._top_t]]
        chosen = torch.zeros(len(hits), dtype=torch.bool, device=grad.device)
        chosen[best.to(grad.device)] = True
        shards = self._pool.table.shards
        if shards is not None and not shards.by_columns:
            chosen = chosen[shards.offset : shards.offset + shards.own]
        return _kept(grad, chosen)


def _kept(grad: Tensor, chosen: Tensor) -> Tensor:
    if grad.layout is torch.strided:
        return torch.where(chosen[:, None], grad, 0)
    rows, sums = touched_rows(grad, grad.dtype)
    kept = chosen[rows]
    return coalesced(rows[kept], sums[kept], grad.shape[0])


def _summed(hits: Tensor, groups: list[dist.ProcessGroup]) -> Tensor:
    """A copy: of all ranks, so that every rank chooses the same rows."""
    hits = hits.clone()
    for group in groups:
        dist.all_reduce(hits, group=group)
    return hits
