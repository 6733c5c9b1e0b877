"""`row_adagrad`: Adagrad with one sum of squares a row, FBGEMM's exact row-wise form, on the rows that a step touches.

For each row x [dim] with gradient g and sum of squares s, as `rowwise_adagrad` of FBGEMM (its
`fbgemm_gpu/codegen/genscript/optimizers.py`) has it:

    L2         g' = g + weight_decay * x,  s += mean(g'**2),  x -= lr / (sqrt(s) + eps) * g'
    decoupled  s += mean(g**2),  x = (1 - lr * weight_decay) * x - lr / (sqrt(s) + eps) * g
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.update.row_tables import RowUpdate, chunks, load_rows, register_update


@dataclass(frozen=True)
class RowAdagrad(RowUpdate):
    """The arguments of `row_adagrad`, of which `grad` is no option.

    Attributes:
        squares: [slots], contiguous, in the dtype that rows are updated in: the sums of squares.
    """

    squares: Tensor
    lr: float
    eps: float
    weight_decay: float
    decoupled: bool

    def check(self) -> None:
        super().check()
        slots, dtype, squares = self.param.shape[0], sum_dtype(self.param), self.squares
        if squares.shape != (slots,) or squares.dtype is not dtype or not squares.is_contiguous():
            raise ValueError(
                f"squares: expected contiguous {dtype} {[slots]}, got {squares.dtype} {list(squares.shape)}"
            )

    def run(self) -> None:
        dim = self.param.shape[1]
        if dim == 0:
            return  # the mean of nothing
        assert self.grad is not None, "by the schema"
        for part in chunks(self.rows, dim):
            rows, g = self.rows[part], self.grad[part]
            x = load_rows(self.table, rows)  # [n, dim]
            if self.weight_decay and not self.decoupled:
                g = torch.add(g, x, alpha=self.weight_decay)
            total = self.squares.index_select(0, rows) + g.square().mean(1)  # [n]
            self.squares.index_copy_(0, rows, total)
            if self.weight_decay and self.decoupled:
                x.mul_(1 - self.lr * self.weight_decay)
            x.sub_((self.lr / (total.sqrt() + self.eps)).unsqueeze(1) * g)
            self.store(rows, x)


register_update("row_adagrad", RowAdagrad)
