"""A table that learns by the rows that were hit: `table_gather`, whose gradient may be sparse, and its parts.

    table_gather  (V, s, w)[t]    = sum_h w[t, h] * V[s[t, h]]              [tokens, value_dim]
    table_dot     (V, s, u)[t, h] = V[s[t, h]] . u[t]                       [tokens, hits]
    sparse_scatter(V, [s], [w], [u]) = the sum of weighted_scatter(s, w, u) over the layers, in the rows that they hit:
                                       coalesced sparse COO [num_slots, value_dim]; a slot of -1 is no hit. Two weights
                                       and two gradients for each layer have columns of their own, side by side

They are `weighted_gather`, `gather_dot` and `weighted_scatter` for values whose optimizer leaves a row as it is until a
step touches it, and then makes up for the steps that the row has missed. What is read are the rows V as they are after
all steps, whether they have made up for them or not: `row_state` tells what they have missed. It is empty where rows
miss nothing, or

    history     float64 [1 + capacity, 8]   a `RateHistory`, on the CPU
    last_step   int32 [num_slots]           the step that each row is as of; empty before the first step
    exp_avg     [num_slots, value_dim]      the moments of AdamW; empty for SGD, where rows miss their decay alone
    exp_avg_sq  [num_slots, value_dim]

No row is written, so a read changes nothing that comes later. How many rows are hit is known at run time only: graphs
hold these operators whole, and `merge_scatters` sums those of the layers that share a table. There is no second
derivative.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import autograd_kernel, below_autograd, is_keyed, is_traced
from memcompile.lowering.gather.hits import check_hits, new_dots, new_sums, sum_dtype
from memcompile.lowering.register.operators import register_for_graphs
from memcompile.lowering.register.schema import NAMESPACE, operator
from memcompile.lowering.update.missed_steps import missed_decays, missed_steps
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.lowering.update.row_tables import moment_dtypes

RowState = Sequence[Tensor]

# Between the rows of a table and their state there is no step and no flush of another thread.
TABLE_LOCK = threading.RLock()

_HITS_A_ROW = 4  # from which a copy of a table is cheaper than to correct each hit


def gather(values: Tensor, slots: Tensor, weights: Tensor, row_state: RowState, gradient: str) -> Tensor:
    """`weighted_gather` where that is all that is asked for, since graphs see inside of it; else `table_gather`."""
    if gradient == "dense" and not row_state:
        return operator("weighted_gather")(values, slots, weights)  # type: ignore[no-any-return]
    return operator("table_gather")(values, slots, weights, row_state, gradient)  # type: ignore[no-any-return]


def _gather(values: Tensor, slots: Tensor, weights: Tensor, row_state: RowState, gradient: str) -> Tensor:
    with TABLE_LOCK:
        values, last = _stale(values, slots, row_state)
        if last is not None and _has_moments(row_state):
            return _stale_read("stale_gather", values, slots, weights, row_state, last).to(values.dtype)
        if last is not None:
            weights = weights * _decays(row_state, last).to(weights.dtype)
        return operator("weighted_gather")(values, slots, weights)  # type: ignore[no-any-return]


def _dot(values: Tensor, slots: Tensor, grad: Tensor, row_state: RowState) -> Tensor:
    with TABLE_LOCK:
        values, last = _stale(values, slots, row_state)
        if last is not None and _has_moments(row_state):
            return _stale_read("stale_dot", values, slots, grad, row_state, last)
        dots: Tensor = operator("gather_dot")(values, slots, grad)
        return dots if last is None else dots * _decays(row_state, last).to(dots.dtype)


def _has_moments(row_state: RowState) -> bool:
    return row_state[2].numel() > 0


def _decays(row_state: RowState, last: Tensor) -> Tensor:
    """What rows as of the steps `last` are multiplied by, where they miss nothing else."""
    history = RateHistory(row_state[0])
    return missed_decays(history, last, history.step)


def _stale_read(name: str, values: Tensor, slots: Tensor, other: Tensor, row_state: RowState, last: Tensor) -> Tensor:
    """`stale_gather` or `stale_dot` of rows as of the steps `last`, some of which have missed steps."""
    history = RateHistory(row_state[0])
    missed = missed_steps(history, last, history.step, sum_dtype(values))
    assert missed is not None, "asked where rows have missed steps"
    return operator(name)(values, *row_state[2:], slots, other, *missed, history.eps)  # type: ignore[no-any-return]


def _stale(values: Tensor, slots: Tensor, row_state: RowState) -> tuple[Tensor, Tensor | None]:
    """The table to read, and the steps that the rows of these slots [tokens, hits] are as of, int32; None where they
    have missed none.
    """
    if not row_state or row_state[1].numel() == 0:
        return values, None
    history, last_step = row_state[:2]
    # A copy of bf16 would be rounded.
    is_small = slots.numel() >= _HITS_A_ROW * values.shape[0] and values.dtype is not torch.bfloat16
    if _is_cast(values, row_state) or is_small:
        return current_table(values, row_state), None
    last = last_step.index_select(0, slots.reshape(-1)).view(slots.shape)
    return values, last if bool((last != RateHistory(history).step).any()) else None


def current_table(values: Tensor, row_state: RowState) -> Tensor:
    """The table [num_slots, dim] as it is after all steps: itself where no row has missed any, else a copy."""
    rows = (row_state[1] != RateHistory(row_state[0]).step).nonzero()[:, 0]
    if len(rows) == 0:
        return values
    return values.index_copy(0, rows, current_rows(values, rows, row_state).to(values.dtype))


def current_rows(values: Tensor, rows: Tensor, row_state: RowState) -> Tensor:
    """These rows [n, dim], some of which have missed steps, as they are after all steps; in the dtype of values, or in
    that of sums.
    """
    history, last_step, *moments = row_state
    last = last_step[rows].unsqueeze(1)
    if not _has_moments(row_state):
        return values[rows] * _decays(row_state, last).to(sum_dtype(values))
    ones = torch.ones(len(rows), 1, dtype=sum_dtype(values), device=rows.device)  # a hit a row, of weight 1
    if not _is_cast(values, row_state):
        return _stale_read("stale_gather", values, rows.unsqueeze(1), ones, row_state, last)
    # Moments of another dtype are beside values that were cast since their last step.
    current = values[rows].to(sum_dtype(values))
    of_rows = [m[rows] if m.dtype in moment_dtypes(current) else m[rows].to(current.dtype) for m in moments]
    own = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    return _stale_read("stale_gather", current, own, ones, [history, last_step, *of_rows], last)


def _is_cast(values: Tensor, row_state: RowState) -> bool:
    """Whether no step can have made these values with these moments."""
    moment = row_state[2]
    return values.dtype is torch.float16 or (moment.numel() > 0 and moment.dtype not in moment_dtypes(values))


Factors = Sequence[Tensor]  # slots, weights or gradients, of one layer each; two a layer where rows are pairs


def _sparse_scatter(values: Tensor, slots: Factors, weights: Factors, grads: Factors, opaque: bool = False) -> Tensor:
    layers, factors = len(slots), len(weights) // max(1, len(slots))
    if factors not in (1, 2) or not layers * factors == len(weights) == len(grads):
        raise ValueError(
            f"sparse_scatter: expected one or two weights and grads for each of {layers} slots, got {len(weights)} and "
            f"{len(grads)}"
        )
    for hits in zip((s for s in slots for _ in range(factors)), weights, grads, strict=True):
        check_hits(*hits)
    sums_of = [of[first::factors] for first in range(factors) for of in (weights, grads)]
    joined, *parts = (parts[0] if layers == 1 else torch.cat([*parts]) for parts in (slots, *sums_of))
    # A slot of -1 is no hit: it becomes a row before the table, which is left out.
    before = int(joined.numel() > 0 and bool((joined < 0).any()))
    joined = joined + before if before else joined
    rows, sums = operator("row_sums")(joined, *parts[:2], values.shape[0] + before, *parts[2:])
    first = int(before > 0 and bool(rows[0] == 0))
    return coalesced(rows[first:] - before, sums[first:], values.shape[0])


def _scatter_fake(values: Tensor, slots: Factors, weights: Factors, grads: Factors, opaque: bool = False) -> Tensor:
    # Graphs do not ask how many rows there are. For opaque ones see `merge_scatters`: their sizes and strides are what
    # a sparse tensor reports.
    if opaque:
        return values.new_empty_strided(values.shape, (0, 0))
    rows = torch.empty(0, dtype=torch.int64, device=values.device)
    return coalesced(rows, values.new_empty(0, values.shape[1]), values.shape[0])


def coalesced(rows: Tensor, sums: Tensor, num_slots: int) -> Tensor:
    """The sparse COO tensor [num_slots, dim] of distinct ascending rows int64 [n] and their sums [n, dim]."""
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0),
        sums,
        (num_slots, sums.shape[1]),
        device=sums.device,  # PyTorch's default device would win over that of the parts
        check_invariants=False,
        is_coalesced=True,
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    # The table and its state are no activations: hooks on saved tensors, which offload or compress those, would copy
    # them. So they are kept as they are, with a check of its own that no step came between.
    ctx.values, slots, weights, ctx.row_state, ctx.gradient = inputs
    ctx.version = ctx.values._version
    ctx.save_for_backward(slots, weights)


def check_unchanged(values: Tensor, version: int) -> None:
    """Raises RuntimeError where a table is not the one that the forward read, as autograd does for saved tensors."""
    if values._version != version:
        raise RuntimeError(
            "the memory's values were modified in place, by an optimizer's step for example, between the forward and "
            "this backward: call backward() before step()"
        )


def refuse_second_derivative() -> None:
    """Raises NotImplementedError where a derivative of this backward is asked for."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the gradient of memory values is sparse and has no derivative of its own: for create_graph=True plan the "
            "model with values_grad='dense'"
        )


def is_dense(gradient: str, grad: Tensor) -> bool:
    """Whether the table's gradient is dense: where it is to be, and in graphs of backends that have not
    `merge_scatters`, since Inductor's own cannot add sparse tensors.
    """
    return gradient == "dense" or (is_traced(grad) and not is_keyed())


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    refuse_second_derivative()
    values, (slots, weights) = ctx.values, ctx.saved_tensors
    check_unchanged(values, ctx.version)
    grad_values = grad_weights = None
    if ctx.needs_input_grad[2]:
        grad_weights = operator("table_dot")(values, slots, grad, ctx.row_state).to(weights.dtype)
    if ctx.needs_input_grad[0] and is_dense(ctx.gradient, grad):
        grad_values = operator("weighted_scatter")(slots, weights, grad, values.shape[0])
    elif ctx.needs_input_grad[0]:
        grad_values = operator("sparse_scatter")(values, [slots], [weights], [grad])
    return grad_values, None, grad_weights, None, None


def _forward(*args: Any) -> Any:
    with below_autograd():
        return operator("table_gather")(*args)


register_for_graphs("table_dot", _dot, new_dots, "CompositeExplicitAutograd")
register_for_graphs("sparse_scatter", _sparse_scatter, _scatter_fake, "CompositeExplicitAutograd")
_derivative = autograd_kernel(
    f"{NAMESPACE}::table_gather", forward=_forward, setup_context=_setup_context, backward=_backward
)
register_for_graphs("table_gather", _gather, new_sums, "CompositeExplicitAutograd", _derivative)
