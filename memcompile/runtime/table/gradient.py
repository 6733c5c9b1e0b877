"""The gradient of the values when autograd has added it up: coalesced, and averaged over replicas."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from memcompile.lowering.gather.table_gather import coalesced
from memcompile.runtime.distributed.averaging import average_after_backward
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
    average_after_backward(table)
    if table.sharded is not None:
        for hook in (table.values._post_accumulate_grad_hooks or {}).values():  # autograd knows the part alone
            hook(table.values)


def sum_of_rows(grad: Tensor) -> Tensor:
    """The same gradient, coalesced: autograd forgets that one is, and on some devices adds two by appending them."""
    return coalesced(*touched_rows(grad, grad.dtype), num_slots=grad.shape[0])
