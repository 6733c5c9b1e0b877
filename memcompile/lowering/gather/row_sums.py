"""`row_sums`: the sparse gradient of a table. Nothing in it is of the table's size.

With slots s and weights w [tokens, hits], and a gradient u [tokens, value_dim], of the distinct slots n, ascending:

    row_sums(s, w, u)[n] = sum_{t, h: s[t, h] = n} w[t, h] * u[t]     [rows, value_dim]

which is what `weighted_scatter` has in the rows that it hits, bit for bit. How many rows there are is known at run time
only. There is no derivative.
"""

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import check_hits, sums_of_hits
from memcompile.lowering.register.operators import register_operator


def _check(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> None:
    check_hits(slots, weights, grad)


def _kernel(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    rows, sums = sums_of_hits(slots, weights, grad)
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_slots):
        raise IndexError(f"slots: {int(rows[0])} to {int(rows[-1])} are out of range for a table of {num_slots} rows")
    return rows, sums


def _fake(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return slots.new_empty(count, dtype=torch.int64), grad.new_empty(count, grad.shape[1])


register_operator("row_sums", check=_check, kernel=_kernel, fake=_fake)
