"""`row_adagrad`: Adagrad with one sum of squares a row, FBGEMM's exact row-wise form, on the rows that a step touches.

For each row x [dim] with gradient g and sum of squares s, as `rowwise_adagrad` of FBGEMM (its
`fbgemm_gpu/codegen/genscript/optimizers.py`) has it:

    L2         g' = g + weight_decay * x,  s += mean(g'**2),  x -= lr / (sqrt(s) + eps) * g'
    decoupled  s += mean(g**2),  x = (1 - lr * weight_decay) * x - lr / (sqrt(s) + eps) * g
"""

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.update.row_tables import (
    Gradient,
    check_rows,
    chunks,
    load_rows,
    register_row_operator,
    store_values,
)


def _check(
    values: Tensor,
    rounded: Tensor | None,
    squares: Tensor,
    rows: Tensor,
    grad: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    seed: int,
    ends: Tensor | None = None,
    hits: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    check_rows(values, rounded, rows)
    Gradient.check(values, rows, grad, ends, hits, weights)
    if squares.shape != values.shape[:1] or squares.dtype is not sum_dtype(values) or not squares.is_contiguous():
        raise ValueError(
            f"squares: expected contiguous {sum_dtype(values)} {[values.shape[0]]}, "
            f"got {squares.dtype} {list(squares.shape)}"
        )


def _kernel(
    values: Tensor,
    rounded: Tensor | None,
    squares: Tensor,
    rows: Tensor,
    grad: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    seed: int,
    ends: Tensor | None = None,
    hits: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    if values.shape[1] == 0:
        return  # the mean of nothing
    gradient = Gradient(grad, ends, hits, weights)
    for part in chunks(rows, values.shape[1]):
        these = rows[part]
        x = load_rows(values, these)  # [n, dim]
        g = gradient.of(part, x.dtype)
        if weight_decay and not decoupled:
            g = torch.add(g, x, alpha=weight_decay)
        total = squares.index_select(0, these) + g.square().mean(1)  # [n]
        squares.index_copy_(0, these, total)
        if weight_decay and decoupled:
            x.mul_(1 - lr * weight_decay)
        x.sub_((lr / (total.sqrt() + eps)).unsqueeze(1) * g)
        store_values(values, rounded, these, x, seed)


register_row_operator("row_adagrad", _check, _kernel)
