"""Two operators for sparse gradients of a table: `hits_by_row` and `row_sums`. Nothing in them is of the table's size.

With slots s and weights w [tokens, hits], and a gradient u [tokens, value_dim], of the distinct slots n, ascending:

    row_sums(s, w, u)[n] = sum_{t, h: s[t, h] = n} w[t, h] * u[t]     [rows, value_dim]

which is what `weighted_scatter` has in the rows that it hits, bit for bit. `hits_by_row` tells which hits each row has:
with the weights and u they are the gradient in factors, which the operators that update rows take too. How many rows
there are is known at run time only. There is no derivative.
"""

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import check_hits, check_slots, runs_of_hits, sums_of_hits
from memcompile.lowering.update.row_tables import register_row_operator


def _check_range(rows: Tensor, num_slots: int) -> None:
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_slots):
        raise IndexError(f"slots: {int(rows[0])} to {int(rows[-1])} are out of range for a table of {num_slots} rows")


def _new_size() -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


# --- hits_by_row ----------------------------------------------------------------------------------


def _check_hits(slots: Tensor, num_slots: int) -> None:
    check_slots(slots)


def _hits(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, ends, hits = runs_of_hits(slots)
    _check_range(rows, num_slots)
    return rows, ends, hits


def _hits_fake(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    size, dtype = _new_size(), torch.int64
    return (
        slots.new_empty(size, dtype=dtype),
        slots.new_empty(size + 1, dtype=dtype),
        slots.new_empty(slots.numel(), dtype=dtype),
    )


# --- row_sums -------------------------------------------------------------------------------------


def _check_sums(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> None:
    check_hits(slots, weights, grad)


def _sums(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    rows, sums = sums_of_hits(slots, weights, grad)
    _check_range(rows, num_slots)
    return rows, sums


def _sums_fake(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    size = _new_size()
    return slots.new_empty(size, dtype=torch.int64), grad.new_empty(size, grad.shape[1])


register_row_operator("hits_by_row", _check_hits, _hits, _hits_fake)
register_row_operator("row_sums", _check_sums, _sums, _sums_fake)
