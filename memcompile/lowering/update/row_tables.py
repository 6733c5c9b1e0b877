"""The operators that update rows of a table in place: the arguments that they share, rows in and out of tables, and two
of them, `row_sgd` and `row_adagrad`.

They read and write the rows that they are given and no others, and return nothing. A row that the table does not have
raises, but on a GPU, where Triton's kernels leave it out: they do not wait to know.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.operators import register_arguments
from memcompile.lowering.register.schema import expect
from memcompile.lowering.update.stochastic_rounding import round_rows

PARAM, EXP_AVG, EXP_AVG_SQ = range(3)  # the tables of a step, which round apart
_CHUNK_ELEMENTS = 2**20  # of one table that the PyTorch operators hold at once


@dataclass(frozen=True)
class RowUpdate:
    """The arguments that each of these operators begins with; a subclass adds its own, in the order of its schema.

    Attributes:
        param: [slots, dim], float32, float64 or bfloat16, contiguous: the table that learns.
        master: None, or float32 of the shape of a bfloat16 `param`, contiguous: then it is what is updated, and `param`
            is the nearest to it. A bfloat16 `param` without it is rounded stochastically.
        rows: int64 [n], distinct: the rows that are updated.
        grad: [n, dim] in the dtype that rows are updated in, `sum_dtype(param)`; None for an update without a gradient.
        seed: 32 bits, of `seed_of_step`.
    """

    param: Tensor
    master: Tensor | None
    rows: Tensor
    grad: Tensor | None
    seed: int

    @property
    def table(self) -> Tensor:
        """[slots, dim]: what is updated."""
        return self.param if self.master is None else self.master

    def check(self) -> None:
        """Raises ValueError for arguments that the operator cannot take."""
        param, master = self.param, self.master
        check_table("param", param)
        if master is not None:
            expect("param with a master", param, param.shape, torch.bfloat16)
            expect("master", master, param.shape, torch.float32, contiguous=True)
        expect("rows", self.rows, ("n",), torch.int64)
        if self.grad is not None:
            expect("grad", self.grad, (len(self.rows), param.shape[1]), sum_dtype(param))

    def run(self) -> None:
        """Updates the rows, in operations of PyTorch."""
        for part in chunks(self.rows, self.param.shape[1]):
            rows, grad = self.rows[part], None if self.grad is None else self.grad[part]
            self.store(rows, self.updated(part, rows, load_rows(self.table, rows), grad))

    def fake(self) -> None:
        """Nothing is returned."""

    def updated(self, part: slice, rows: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
        """What a `part` of the rows becomes: x [n, dim] by its gradient [n, dim]. State is updated in place."""
        raise NotImplementedError

    def store(self, rows: Tensor, x: Tensor) -> None:
        """Writes rows of the table back, x [n, dim]."""
        store_rows(self.table, rows, x, self.seed, PARAM)
        if self.master is not None:
            self.param.index_copy_(0, rows, x.to(self.param.dtype))


def check_table(name: str, table: Tensor) -> None:
    """Raises ValueError unless these are rows that an operator updates or corrects: of no float16, contiguous."""
    expect(name, table, ("slots", "dim"), torch.float32, torch.float64, torch.bfloat16, contiguous=True)


def check_moments(exp_avg: Tensor, exp_avg_sq: Tensor, table: Tensor) -> None:
    """Raises ValueError for what are not Adam's moments of this table."""
    expect("exp_avg", exp_avg, table.shape, *moment_dtypes(table), contiguous=True)
    expect("exp_avg_sq", exp_avg_sq, table.shape, exp_avg.dtype, contiguous=True)


def moment_dtypes(table: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of moments beside this table."""
    return (torch.float64,) if table.dtype is torch.float64 else (torch.float32, torch.bfloat16)


def chunks(rows: Tensor, dim: int) -> Iterator[slice]:
    """Parts of the rows, so that what is gathered stays small."""
    size = max(1, _CHUNK_ELEMENTS // max(1, dim))
    return (slice(start, start + size) for start in range(0, len(rows), size))


def load_rows(table: Tensor, rows: Tensor) -> Tensor:
    """A copy of the rows [n, dim] in the dtype that they are updated in."""
    return table.index_select(0, rows).to(sum_dtype(table))


def store_rows(table: Tensor, rows: Tensor, x: Tensor, seed: int, number: int) -> None:
    """Writes rows back: bf16 from fp32 is rounded stochastically."""
    lower = table.dtype is torch.bfloat16 and x.dtype is torch.float32
    table.index_copy_(0, rows, round_rows(x, rows, seed, number) if lower else x)


@dataclass(frozen=True)
class RowSgd(RowUpdate):
    """The arguments of `row_sgd`: x = decay * x - rate * g, each row with the decay of what it has missed.

    Attributes:
        decays: float64 [n], of each row; None for 1.
        rate: of the gradient.
    """

    decays: Tensor | None
    rate: float

    def check(self) -> None:
        super().check()
        if self.decays is not None:
            expect("decays", self.decays, self.rows.shape, torch.float64)

    def updated(self, part: slice, rows: Tensor, x: Tensor, grad: Tensor | None) -> Tensor:
        if self.decays is not None:
            x.mul_(self.decays[part].to(x.dtype).unsqueeze(1))
        return x if grad is None else x.sub_(grad, alpha=self.rate)


@dataclass(frozen=True)
class RowAdagrad(RowUpdate):
    """The arguments of `row_adagrad`, of which `grad` is no option: Adagrad with one sum of squares a row.

    For each row x [dim] with gradient g and sum of squares s, as `rowwise_adagrad` of FBGEMM (its
    `fbgemm_gpu/codegen/genscript/optimizers.py`) has it:

        L2         g' = g + weight_decay * x,  s += mean(g'**2),  x -= lr / (sqrt(s) + eps) * g'
        decoupled  s += mean(g**2),  x = (1 - lr * weight_decay) * x - lr / (sqrt(s) + eps) * g

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
        if self.weight_decay and not self.decoupled:
            grad = grad.add(x, alpha=self.weight_decay)
        total = self.squares.index_select(0, rows) + grad.square().mean(1)  # [n]
        if self.decoupled:
            x.mul_(1 - self.lr * self.weight_decay)
        self.squares.index_copy_(0, rows, total)
        return x.sub_((self.lr / (total.sqrt() + self.eps)).unsqueeze(1) * grad)


register_arguments("row_sgd", RowSgd)
register_arguments("row_adagrad", RowAdagrad)
