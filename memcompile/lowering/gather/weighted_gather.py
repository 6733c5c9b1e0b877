"""Three operators, closed under differentiation: `weighted_gather`, `gather_dot` and `weighted_scatter`; `row_sums`.

With rows V [num_slots, value_dim], slots s and weights w [tokens, hits], and u [tokens, value_dim]:

    weighted_gather (V, s, w)[t]    = sum_h w[t, h] * V[s[t, h]]              [tokens, value_dim]
    gather_dot      (V, s, u)[t, h] = V[s[t, h]] . u[t]                       [tokens, hits]
    weighted_scatter(s, w, u)[n]    = sum_{t, h: s[t, h] = n} w[t, h] * u[t]  [num_slots, value_dim]

`row_sums` (s, w, u) has the distinct slots, int64 [rows], ascending, and the rows of `weighted_scatter` that they hit,
bit for bit: nothing in it is of the table's size. How many there are is known at run time only. It has no derivative.
With `more_weights` [tokens, hits] and `more_grad` [tokens, more_dim] the sums of these are further columns.

Rows come out in the dtype that rows came in, dots in fp32 for half dtypes. All three are derivatives of one
trilinear form, so each one's gradients are the other two. No kernel builds [tokens, hits, value_dim], and
each row of an output has one owner: the results are deterministic. Sums are kept in fp32 for half dtypes.
The kernels here run where a device has none of its own; they round the weights to the rows' dtype first.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memcompile.lowering.gather.hits import (
    check_dot,
    check_hits,
    check_slots,
    new_dots,
    new_sums,
    parts_of_tokens,
    sum_dtype,
    sums_of_hits,
)  # fmt: skip
from memcompile.lowering.register.operators import register_differentiable, register_operator
from memcompile.lowering.register.schema import expect, operator
from memcompile.lowering.register.vmap import fold_into_tokens, offset_slots, unfold_tokens

# Gathered rows that gather_dot holds at once, in elements. On a CPU they stay in the second-level cache: 26 ms
# against 92 with 2**22 on [512, 128] hits of bf16 rows of 1,024. An accelerator wants few launches.
_CHUNK_ELEMENTS = {"cpu": 2**17, "accelerator": 2**26}


def _reading_vmap(name: str) -> Callable[..., tuple[Tensor, int]]:
    """The rule of an operator (values, slots, a tensor of tokens) -> a tensor of tokens."""

    def rule(info: Any, in_dims: Any, values: Tensor, slots: Tensor, other: Tensor) -> tuple[Tensor, int]:
        batch = info.batch_size
        if in_dims[0] is None:
            slots = fold_into_tokens(slots, in_dims[1], batch)
        else:
            tables = values.movedim(in_dims[0], 0)
            slots = offset_slots(slots, in_dims[1], batch, tables.shape[1])
            values = tables.flatten(0, 1)
        out = operator(name)(values, slots, fold_into_tokens(other, in_dims[2], batch))
        return unfold_tokens(out, batch), 0

    return rule


def _check_gather(values: Tensor, slots: Tensor, weights: Tensor) -> None:
    expect("values", values, ("num_slots", "value_dim"))
    check_slots(slots)
    expect("weights", weights, slots.shape)


def _gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    rows = values.detach()
    weights = weights.detach().to(rows.dtype)
    return F.embedding_bag(slots, rows, per_sample_weights=weights, mode="sum")


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    values, slots, weights = ctx.saved_tensors
    of_values, _, of_weights = ctx.needs_input_grad
    grad_values = operator("weighted_scatter")(slots, weights, grad, values.shape[0]) if of_values else None
    grad_weights = operator("gather_dot")(values, slots, grad).to(weights.dtype) if of_weights else None
    return grad_values, None, grad_weights


def _dot(values: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
    values, grad, dtype = values.detach(), grad.detach(), sum_dtype(values)
    out = new_dots(values, slots)
    for tokens in parts_of_tokens(slots, values.shape[1], _CHUNK_ELEMENTS):
        part = slots[tokens]
        rows = values.index_select(0, part.reshape(-1)).to(dtype).reshape(*part.shape, values.shape[1])
        out[tokens] = (rows @ grad[tokens].to(dtype).unsqueeze(-1)).squeeze(-1)  # [tokens, hits, value_dim] @ [.., 1]
    return out


def _dot_backward(ctx: Any, grad_dots: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    values, slots, grad = ctx.saved_tensors
    of_values, _, of_grad = ctx.needs_input_grad
    grad_values = operator("weighted_scatter")(slots, grad_dots, grad, values.shape[0]) if of_values else None
    grad_grad = operator("weighted_gather")(values, slots, grad_dots) if of_grad else None
    return grad_values, None, grad_grad


def _scatter(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> Tensor:
    rows, sums = sums_of_hits(slots, (weights, grad))
    return grad.new_zeros(num_slots, grad.shape[1]).index_copy_(0, rows, sums)


def _scatter_fake(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> Tensor:
    return grad.new_empty(num_slots, grad.shape[1])


def _scatter_vmap(
    info: Any, in_dims: Any, slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int
) -> tuple[Tensor, int]:
    batch = info.batch_size
    rows = offset_slots(slots, in_dims[0], batch, num_slots)
    weights = fold_into_tokens(weights, in_dims[1], batch)
    grad = fold_into_tokens(grad, in_dims[2], batch)
    out = operator("weighted_scatter")(rows, weights, grad, batch * num_slots)
    return out.reshape(batch, num_slots, grad.shape[1]), 0


def _scatter_backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
    slots, weights, grad = ctx.saved_tensors
    _, of_weights, of_grad, _ = ctx.needs_input_grad
    grad_weights = operator("gather_dot")(grad_out, slots, grad).to(weights.dtype) if of_weights else None
    grad_grad = operator("weighted_gather")(grad_out, slots, weights) if of_grad else None
    return None, grad_weights, grad_grad, None


def _sums(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int, *more: Tensor | None) -> tuple[Tensor, Tensor]:
    more_weights, more_grad = more or (None, None)
    factors = [(weights, grad)]
    if more_weights is not None and more_grad is not None:
        factors.append((more_weights, more_grad))
    rows, sums = sums_of_hits(slots, *factors)
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_slots):
        raise IndexError(f"slots: {int(rows[0])} to {int(rows[-1])} are out of range for a table of {num_slots} rows")
    return rows, sums


def _sums_fake(
    slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int, *more: Tensor | None
) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    columns = grad.shape[1] + (more[1].shape[1] if more and more[1] is not None else 0)
    return slots.new_empty(count, dtype=torch.int64), grad.new_empty(count, columns)


register_differentiable(
    "weighted_gather", check=_check_gather, kernel=_gather, fake=new_sums, backward=_gather_backward,
    vmap=_reading_vmap("weighted_gather"),
)  # fmt: skip
register_differentiable(
    "gather_dot", check=check_dot, kernel=_dot, fake=new_dots, vmap=_reading_vmap("gather_dot"), backward=_dot_backward
)
register_differentiable(
    "weighted_scatter", check=check_hits, kernel=_scatter, fake=_scatter_fake, backward=_scatter_backward,
    vmap=_scatter_vmap,
)  # fmt: skip
register_operator("row_sums", check=check_hits, kernel=_sums, fake=_sums_fake)
