"""A table of pairs that learns by the rows that were hit: `table_pairs`, whose gradient may be sparse, and
`table_pair_grads`. They are `pair_gather` and `pair_grads` of the rows as they are after all steps, as `table_gather`
is `weighted_gather` of these. `row_state` is as there.

Where rows have missed steps, the distinct rows that some tokens hit are made current in a copy, in the table's dtype,
and are read from there. That is two to four times as long as rows take that have missed nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import autograd_kernel, below_autograd, functorch_is_active
from memcompile.lowering.gather.hits import parts_of_tokens
from memcompile.lowering.gather.pairs import Grads, composed, new_gather, new_grads
from memcompile.lowering.gather.table_gather import (
    TABLE_LOCK,
    RowState,
    check_unchanged,
    current_rows,
    is_dense,
    refuse_second_derivative,
)
from memcompile.lowering.register.operators import register_for_graphs
from memcompile.lowering.register.schema import NAMESPACE, operator
from memcompile.lowering.update.rate_history import RateHistory

# Of rows that are made current at once, were all of them distinct.
_CHUNK_ELEMENTS = {"cpu": 2**24, "accelerator": 2**28}


def gather_pairs(
    values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, row_state: RowState, gradient: str
) -> Tensor:
    """y of `pair_gather` [tokens, value_dim].

    Args:
        row_state, gradient: as `table_gather` takes them. Under torch.func the gradient is dense, and rows are read as
            they stand.
    """
    if functorch_is_active():
        return composed(values, slots, weights, x)
    if gradient == "dense" and not row_state:
        return operator("pair_gather")(values, slots, weights, x)[0]  # type: ignore[no-any-return]
    return operator("table_pairs")(values, slots, weights, x, row_state, gradient)[0]  # type: ignore[no-any-return]


def _current(values: Tensor, slots: Tensor, row_state: RowState) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tokens after others; a table that has the rows that they hit as they are after all steps; and their slots in
    it.
    """
    if not row_state or row_state[1].numel() == 0 or not _have_missed(slots, row_state):
        yield slice(None), values, slots
        return
    for part in parts_of_tokens(slots, values.shape[1], _CHUNK_ELEMENTS):
        rows, own = torch.unique(slots[part], return_inverse=True)  # type: ignore[no-untyped-call]
        if not _have_missed(rows, row_state):
            yield part, values, slots[part]
            continue
        yield part, current_rows(values, rows.long(), row_state).to(values.dtype), own


def _have_missed(slots: Tensor, row_state: RowState) -> bool:
    """Whether any of these rows has missed steps."""
    last = row_state[1].index_select(0, slots.reshape(-1))
    return bool((last != RateHistory(row_state[0]).step).any())


def _read(name: str, values: Tensor, slots: Tensor, of_tokens: tuple[Tensor, ...], row_state: RowState) -> Any:
    """The operator `name` of the rows as they are, and of tensors [tokens, ...]."""
    parts = []
    with TABLE_LOCK:
        for part, table, own in _current(values, slots, row_state):
            parts.append(operator(name)(table, own, *(t[part] for t in of_tokens)))
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _gather(
    values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, row_state: RowState, gradient: str
) -> tuple[Tensor, Tensor]:
    return _read("pair_gather", values, slots, (weights, x), row_state)  # type: ignore[no-any-return]


def _grads(
    values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, dots: Tensor, grad: Tensor, row_state: RowState
) -> Grads:
    return _read("pair_grads", values, slots, (weights, x, dots, grad), row_state)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    # The table and its state are no activations: see `table_gather`.
    ctx.values, slots, weights, x, ctx.row_state, ctx.gradient = inputs
    ctx.version = ctx.values._version
    ctx.save_for_backward(slots, weights, x, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: Any, grad: Tensor, _: Tensor
) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
    refuse_second_derivative()
    values, (slots, weights, x, dots) = ctx.values, ctx.saved_tensors
    check_unchanged(values, ctx.version)
    of_values, _, of_weights, of_x, *_ = ctx.needs_input_grad
    grad_weights, grad_x, into, out = operator("table_pair_grads")(values, slots, weights, x, dots, grad, ctx.row_state)
    grad_values = None
    if of_values and is_dense(ctx.gradient, grad):
        grad_values = operator("pair_scatter")(slots, into, x, out, grad, values.shape[0])
    elif of_values:
        grad_values = operator("sparse_scatter")(values, [slots], [into, out], [x, grad])
    grad_weights = grad_weights.to(weights.dtype) if of_weights else None
    return grad_values, None, grad_weights, grad_x if of_x else None, None, None


def _forward(*args: Any) -> Any:
    with below_autograd():
        return operator("table_pairs")(*args)


register_for_graphs("table_pair_grads", _grads, new_grads, "CompositeExplicitAutograd")
_derivative = autograd_kernel(
    f"{NAMESPACE}::table_pairs", forward=_forward, setup_context=_setup_context, backward=_backward
)
register_for_graphs("table_pairs", _gather, new_gather, "CompositeExplicitAutograd", _derivative)
