"""A table of pairs that is sharded by rows over a memory group: see `sharded_table`. The tokens travel too, since their
dots are with rows. With P ranks, of at most C tokens each:

    forward    all-gather of the packed slots and weights   [P * C, hits]
               all-gather of the tokens                     [P * C, d]
               partial sums of all tokens, over own rows    [P * C, value_dim]
               reduce-scatter                               [C, value_dim]
    backward   all-gather of the gradient of the sums       [P * C, value_dim]
               reduce-scatter of the weights' gradient      [C, hits]
               reduce-scatter of the tokens' gradient       [C, d]
"""

from typing import Any

import torch
from torch import Tensor

from memcompile.lowering._torch import autograd_kernel, below_autograd
from memcompile.lowering.distributed.sharded_table import (
    Shards,
    agreed_capacity,
    check_backward,
    gather_hits,
    gather_tokens,
    is_own,
    keep_table,
    own_hits,
    own_slots,
    tokens_sum,
)
from memcompile.lowering.gather.pairs import new_gather, new_grads
from memcompile.lowering.gather.table_gather import RowState, check_unchanged
from memcompile.lowering.register.schema import operator


def sharded_pairs(
    table: Tensor,
    slots: Tensor,
    weights: Tensor,
    x: Tensor,
    shards: Shards,
    capacity: int | None,
    gradient: str,
    row_state: RowState = (),
) -> Tensor:
    """`gather_pairs` of this rank's tokens over a whole table.

    Args:
        table: the rows that this rank holds, [own rows, d + value_dim].
        x: [tokens, d] of this rank, in the table's dtype.
        The rest is as in `sharded_gather`.

    Returns:
        [tokens, value_dim].

    Raises:
        As `sharded_gather`.
    """
    capacity = agreed_capacity(slots, shards, capacity)
    return _sharded_pairs(table, slots, weights, x, shards, capacity, gradient, row_state)  # type: ignore[no-any-return]


def _forward(
    ctx: Any,
    table: Tensor,
    slots: Tensor,
    weights: Tensor,
    x: Tensor,
    shards: Shards,
    capacity: int,
    gradient: str,
    row_state: RowState,
) -> Tensor:
    tokens = slots.shape[0]
    with below_autograd():
        if shards.own_tokens:
            slots, weights = gather_hits(slots, weights, capacity, shards)
            x = gather_tokens(x, capacity, shards)  # [P * C, d]
        hits, shares = own_hits(slots, weights, shards)
        if table.numel():
            y, dots = operator("table_pairs")(table, hits, shares, x, row_state, gradient)
        else:
            y, dots = (torch.zeros_like(t) for t in new_gather(table, slots, weights, x))
        if shards.own_tokens:
            y = tokens_sum(y, tokens, shards)
    ctx.save_for_backward(slots, weights, x, dots)  # of all tokens
    keep_table(ctx, table, row_state, shards, capacity, gradient)
    return y


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    check_backward(grad)
    table, (slots, weights, x, dots), shards = ctx.table, ctx.saved_tensors, ctx.shards
    check_unchanged(table, ctx.version)
    tokens = grad.shape[0]
    if shards.own_tokens:
        grad = gather_tokens(grad, ctx.capacity, shards)  # [P * C, value_dim]
    hits, shares = own_hits(slots, weights, shards)
    if table.numel():
        given = (table, hits, shares, x, dots, grad, ctx.row_state)
        grad_weights, grad_x, into, out = operator("table_pair_grads")(*given)
        grad_weights = torch.where(is_own(slots, shards), grad_weights, 0)
    else:
        grad_weights, grad_x, into, out = (torch.zeros_like(t) for t in new_grads(table, slots, weights, x))
    grad_table = None
    if ctx.needs_input_grad[0]:
        if shards.own_tokens:  # the mean over ranks
            into, out = into / shards.ranks, out / shards.ranks
        if ctx.gradient == "sparse":
            factors = [own_slots(slots, shards)], [into, out], [x, grad]
            grad_table = operator("sparse_scatter")(table, *factors)
        elif table.numel():
            grad_table = operator("pair_scatter")(hits, into, x, out, grad, table.shape[0])
        else:
            grad_table = torch.zeros_like(table)
    if shards.own_tokens:
        grad_weights, grad_x = (tokens_sum(t, tokens, shards) for t in (grad_weights, grad_x))
    of_weights, of_x = ctx.needs_input_grad[2:4]
    grads = grad_table, None, grad_weights.to(weights.dtype) if of_weights else None, grad_x if of_x else None
    return (*grads, None, None, None, None)


_sharded_pairs = autograd_kernel("sharded_pairs", forward=_forward, backward=_backward)
