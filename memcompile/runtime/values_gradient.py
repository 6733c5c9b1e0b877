"""The gradient of the values when autograd has added it up: coalesced, summed over replicas, or used up at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from memcompile.lowering.gather.table_gather import coalesced
from memcompile.runtime.distributed.replicas import average_after_backward
from memcompile.runtime.optim.gradients import touched_rows
from memcompile.runtime.pool import MemoryPool

_watched: Any = WeakTensorKeyDictionary()  # not an attribute: a parameter is pickled with those


def watch_gradient(pool: MemoryPool) -> None:
    """Sees every gradient that the values get from here on. Idempotent: values that were replaced are watched anew."""
    table, of = pool.table, weakref.ref(pool)
    dense = pool.values_grad == "dense" and pool.sharded is None
    if dense or not table.requires_grad or table in _watched:
        return

    def hook(parameter: Tensor) -> None:
        owner = of()
        if owner is not None and parameter.grad is not None:
            _added_up(owner, parameter)

    _watched[table] = table.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _added_up(pool: MemoryPool, table: Tensor) -> None:
    grad = table.grad
    assert grad is not None
    if pool.config.gradient == "fused" and grad.is_sparse:
        assert pool.stepper is not None, "it took the factors"
        table.grad = None
        pool.stepper.update()
        return
    if pool.sharded is not None:  # the table is a part: its gradient joins that of the whole
        table.grad, before = None, pool.table_grad
        grad = grad if before is None else before + grad if before.is_sparse else before.add_(grad)
    pool.table_grad = sum_of_rows(grad) if grad.is_sparse else grad
    average_after_backward(pool)
    if pool.sharded is not None:
        for hook in (pool.values._post_accumulate_grad_hooks or {}).values():  # autograd knows the part alone
            hook(pool.values)


def sum_of_rows(grad: Tensor) -> Tensor:
    """The same gradient, coalesced: autograd forgets that one is, and on some devices adds two by appending them."""
    return coalesced(*touched_rows(grad, grad.dtype), num_slots=grad.shape[0])
