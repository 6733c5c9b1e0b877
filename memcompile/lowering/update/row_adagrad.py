"""`row_adagrad`: Adagrad with one sum of squares a row, FBGEMM's exact row-wise form, on the rows that a step touches.

For each row x [dim] with gradient g and sum of squares s, as `rowwise_adagrad` of FBGEMM (its
`fbgemm_gpu/codegen/genscript/optimizers.py`) has it:

    L2         g' = g + weight_decay * x,  s += mean(g'**2),  x -= lr / (sqrt(s) + eps) * g'
    decoupled  s += mean(g**2),  x = (1 - lr * weight_decay) * x - lr / (sqrt(s) + eps) * g
"""

from dataclasses import dataclass

from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.operators import register_arguments
from memcompile.lowering.register.schema import expect
from memcompile.lowering.update.row_tables import RowUpdate


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
        expect("squares", self.squares, self.param.shape[:1], sum_dtype(self.param), contiguous=True)

    def updated(self, part: slice, rows: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
        assert grad is not None, "by the schema"
        if x.shape[1] == 0:
            return x  # the mean of nothing
        total = self.squares.index_select(0, rows)  # [n]
        if self.decoupled:
            total += grad.square().mean(1)
            x.mul_(1 - self.lr * self.weight_decay)
        else:
            grad = grad.add(x, alpha=self.weight_decay)
            total += grad.square().mean(1)
        self.squares.index_copy_(0, rows, total)
        return x.sub_((self.lr / (total.sqrt() + self.eps)).unsqueeze(1) * grad)


register_arguments("row_adagrad", RowAdagrad)
