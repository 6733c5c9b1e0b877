"""Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): of each batch, only the slots learn that it hits
unusually often.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memcompile.errors import OptionError, PlanError
from memcompile.runtime.pool import MemoryPool
from memcompile.runtime.table.table import ValueTable
from memcompile.slots.background import Background, background_of, put_background
from memcompile.slots.counting import Run, counted, each_with_progress, evaluating, memory_of, run_batch

log = logging.getLogger(__name__)


@contextlib.contextmanager
def finetune_slots(
    model: nn.Module, *, top_t: int, background: Iterable[Any] | None = None, run: Run = run_batch
) -> Iterator[None]:
    """In a block, each step of the user's optimizer moves only the slots that stand out in its batch.

    Let c_i be how often the tokens since the last step hit slot i, B how many batches of the background there were, and
    b_i in how many of them slot i was hit. The slots of the `top_t` highest scores

        c_i / sum_j c_j * log((B + 1) / (b_i + 1))

    keep their gradient, of those that were hit; of equal ones the lower slot. The gradient of all others is zero, and
    the table has no weight decay. A momentum from earlier steps of the block goes on, under rules that have one. Forwards
    under `no_grad` do not count.

    The user's loop stays as it is. All other parameters of the model are frozen in the block: they have no gradient,
    and optimizers skip them. Afterwards they are trainable as before.

        with memcompile.finetune_slots(model, background=old_batches, top_t=500):
            for batch in new_batches: ...

    Args:
        model: a planned model, or what wraps one.
        top_t: how many slots a step moves.
        background: batches of what the model is to keep. They are run once, in eval mode, and how many of them hit each
            slot is kept in the model: `state_dict()` has it under `memory_background_hits`, and a later call takes
            None. Batches that are given replace it.
        run: calls the model with a batch. By default a tensor or a tuple is positional arguments, a dict keywords.

    Raises:
        OptionError: `top_t` is no positive number, or there is no background.
        PlanError: the model has no memory, its table does not learn, or such a block is open already.
    """
    pool = memory_of(model)
    if not isinstance(top_t, int) or isinstance(top_t, bool) or top_t < 1:
        raise OptionError(f"top_t must be a positive number of slots, got {top_t!r}")
    table = pool.table
    if pool.config.frozen:
        raise PlanError("the values lie in a file or on the host, for inference: plan with values_storage='device'")
    if table.row_filter is not None:
        raise PlanError(f"a block of finetune_slots for {type(model).__name__} is open already: leave it first")
    if background is not None:
        put_background(pool, _count_background(pool, model, background, run))
    found = background_of(pool)
    if found is None:
        raise OptionError(
            "background: expected batches of what the model is to keep: this model has no counts of such batches yet"
        )
    with _only_the_table(model, table), counted(pool, for_gradients=True):
        table.row_filter = _Chooser(pool, found, top_t)
        try:
            yield
        finally:
            table.row_filter = None


def _count_background(pool: MemoryPool, model: nn.Module, batches: Iterable[Any], run: Run) -> Background:
    """How many of the batches hit each slot."""
    hits, total = torch.zeros(pool.config.slots, dtype=torch.int32), 0
    with counted(pool) as counts, evaluating(model):
        hits = hits.to(counts.slot_hits.device)
        for batch in each_with_progress(batches, "background"):
            counts.zero()
            run(model, batch)
            hits += _summed(counts.slot_hits) > 0
            total += 1
    if total == 0 or not hits.any():
        raise OptionError(f"background: {total} batches, none of which hit a slot: give batches that the model runs on")
    return Background(hits, total)


@contextlib.contextmanager
def _only_the_table(model: nn.Module, table: ValueTable) -> Iterator[None]:
    """Freezes all parameters of a model but its table."""
    values = table.values
    others = [p for p in model.parameters() if p is not values and p.requires_grad]
    learned = values.requires_grad
    for parameter in others:
        parameter.requires_grad_(False)
        parameter.grad = None
    values.requires_grad_(True)
    try:
        yield
    finally:
        values.requires_grad_(learned)
        for parameter in others:
            parameter.requires_grad_(True)


class _Chooser:
    """Chooses the rows of each step, and begins to count anew."""

    def __init__(self, pool: MemoryPool, background: Background, top_t: int) -> None:
        self._pool, self._top_t = pool, top_t
        hits = background.hits.double()
        self._rarity = torch.log((background.batches + 1) / (hits + 1))  # [slots]

    def __call__(self, grad: Tensor) -> Tensor:
        """The gradient of a table of which only the chosen rows are left."""
        counts = self._pool.counts
        assert counts is not None
        hits = _summed(counts.slot_hits)
        counts.zero()
        hit = hits.nonzero()[:, 0]
        scores = hits[hit].double() * self._rarity.to(hits.device)[hit]  # a common divisor changes no order
        best = hit[scores.sort(descending=True, stable=True).indices[: self._top_t]]
        chosen = torch.zeros(len(hits), dtype=torch.bool, device=grad.device)
        chosen[best.to(grad.device)] = True
        return _kept(grad, chosen)


def _kept(grad: Tensor, chosen: Tensor) -> Tensor:
    if grad.layout is torch.strided:
        return torch.where(chosen[:, None], grad, 0)
    grad = grad.coalesce()
    kept = chosen[grad.indices()[0]]
    return torch.sparse_coo_tensor(grad.indices()[:, kept], grad.values()[kept], grad.shape, is_coalesced=True)


def _summed(hits: Tensor) -> Tensor:
    """A copy: the hits of all ranks, so that every rank chooses the same rows."""
    hits = hits.clone()
    if dist.is_initialized():
        dist.all_reduce(hits)
    return hits
