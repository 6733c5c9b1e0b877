"""`row_sgd`: x = decay * x - rate * g for the rows that a step touches, each with the decay of what it has missed."""

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
    rows: Tensor,
    grad: Tensor | None,
    decays: Tensor | None,
    rate: float,
    seed: int,
    ends: Tensor | None = None,
    hits: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    check_rows(values, rounded, rows)
    Gradient.check(values, rows, grad, ends, hits, weights)
    if decays is not None and (decays.shape != rows.shape or decays.dtype is not torch.float64):
        raise ValueError(f"decays: expected float64 as rows, got {decays.dtype} {list(decays.shape)}")


def _kernel(
    values: Tensor,
    rounded: Tensor | None,
    rows: Tensor,
    grad: Tensor | None,
    decays: Tensor | None,
    rate: float,
    seed: int,
    ends: Tensor | None = None,
    hits: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    gradient = None if grad is None else Gradient(grad, ends, hits, weights)
    for part in chunks(rows, values.shape[1]):
        these = rows[part]
        x = load_rows(values, these)  # [n, dim]
        if decays is not None:
            x.mul_(decays[part].to(sum_dtype(values)).unsqueeze(1))
        if gradient is not None:
            x.sub_(gradient.of(part, x.dtype), alpha=rate)
        store_values(values, rounded, these, x, seed)


register_row_operator("row_sgd", _check, _kernel)
