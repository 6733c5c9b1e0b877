"""Counts hits while a model trains or is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memcompile.runtime._torch import local_part
from memcompile.runtime.pool import MemoryPool, memory_of
from memcompile.runtime.table.hit_counts import HitCounts


def count_usage(model: nn.Module, counting: bool = True) -> None:
    """Counts, from here on, how often each slot and each half-key is hit, in train and eval mode, eager and compiled:
    :func:`memcompile.usage` shows the counts. A compiled model compiles anew when counting starts or ends.

    Counts take 8 bytes a slot, are of this process, and are in no checkpoint.

    Args:
        counting: False ends it, and drops the counts. True with counts that are there goes on with them.

    Raises:
        PlanError: the model has no memory.
    """
    pool = memory_of(model)
    if not counting:
        pool.counts = None
    elif pool.counts is None:
        pool.counts = new_counts(pool)


def new_counts(pool: MemoryPool) -> HitCounts:
    config: Any = pool.config
    layers = {layer.name: layer for layer in pool.layers.values()}
    device = local_part(next(iter(layers.values())).query_weight).device
    return HitCounts(config.slots, config.heads, config.n_keys, layers, device)


@contextlib.contextmanager
def counted(pool: MemoryPool, for_gradients: bool = False) -> Iterator[HitCounts]:
    """Counts from zero in a block, in counts of its own; those from before go on afterwards.

    Args:
        for_gradients: whether forwards without gradients do not count.
    """
    before = pool.counts
    pool.counts = own = new_counts(pool)
    own.for_gradients = for_gradients
    try:
        yield own
    finally:
        pool.counts = before


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Calls a model with one batch: a tensor, a tuple or list of positional, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode without gradients; each module is in the mode that it was in afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def each_with_progress(batches: Iterable[Any], doing: str) -> Iterator[Any]:
    """The batches, under a bar where stderr is a terminal and tqdm is installed."""
    with contextlib.suppress(ImportError):
        from tqdm.auto import tqdm

        batches = tqdm(batches, doing, unit="batch", disable=None, leave=False)
    return iter(batches)


Run = Callable[[nn.Module, Any], Any]
