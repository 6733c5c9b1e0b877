"""`row_sgd`: x = decay * x - rate * g for the rows that a step touches, each with the decay of what it has missed."""

import torch
from torch import Tensor

from memcompile.lowering.row_tables import (
    check_rows,
    chunks,
    load_rows,
    register_row_operator,
    store_values,
    sum_dtype,
)


def _check(
    values: Tensor,
    rounded: Tensor | None,
    rows: Tensor,
    grad: Tensor | None,
    decays: Tensor | None,
    rate: float,
    seed: int,
) -> None:
    check_rows(values, rounded, rows, grad)
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
) -> None:
    for part in chunks(rows, values.shape[1]):
        these = rows[part]
        x = load_rows(values, these)  # [n, dim]
        if decays is not None:
            x.mul_(decays[part].to(sum_dtype(values)).unsqueeze(1))
        if grad is not None:
            x.sub_(grad[part], alpha=rate)
        store_values(values, rounded, these, x, seed)


register_row_operator("row_sgd", _check, _kernel)
