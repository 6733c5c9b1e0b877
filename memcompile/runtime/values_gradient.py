"""The gradient of the values when autograd has added it up: coalesced, summed over replicas, or used up at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from memcompile.lowering.sparse_table import coalesced
from memcompile.runtime.optim.gradients import touched_rows
from memcompile.runtime.pool import MemoryPool
from memcompile.runtime.replicas import average_after_backward

_watched: Any = WeakTensorKeyDictionary()  # not an attribute: a parameter is pickled with those


def watch_gradient(pool: MemoryPool) -> None:
    """Sees every gradient that the values get from here on. Idempotent: values that were replaced are watched anew."""
    values, of = pool.values, weakref.ref(pool)
    if pool.values_grad == "dense" or not values.requires_grad or values in _watched:
        return

    def hook(parameter: Tensor) -> None:
        owner = of()
        if owner is not None and parameter.grad is not None and parameter.grad.is_sparse:
            _added_up(owner, parameter)

    _watched[values] = values.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _added_up(pool: MemoryPool, values: Tensor) -> None:
    assert values.grad is not None
    if pool.config.gradient == "fused":
        assert pool.stepper is not None, "it took the factors"
        values.grad = None
        pool.stepper.update()
    else:
        values.grad = sum_of_rows(values.grad)
        average_after_backward(pool)


def sum_of_rows(grad: Tensor) -> Tensor:
    """The same gradient, coalesced: autograd forgets that one is, and on some devices adds two by appending them."""
    return coalesced(*touched_rows(grad, grad.dtype), num_slots=grad.shape[0])
