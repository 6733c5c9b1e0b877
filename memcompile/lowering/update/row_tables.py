"""What the operators that update rows of a table in place share: their arguments, and rows in and out of tables.

They read and write the rows that they are given and no others, and return nothing. A row that the table does not have
raises, but on a GPU, where Triton's kernels leave it out: they do not wait to know.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype
from memcompile.lowering.register.operators import register_operator
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
        param, master, rows, grad = self.param, self.master, self.rows, self.grad
        check_table("param", param, param)
        if master is not None:
            check_table("master", master, param)
            if master.dtype is not torch.float32 or param.dtype is not torch.bfloat16:
                raise ValueError(f"master: expected float32 for a bfloat16 param, got {master.dtype} for {param.dtype}")
        if rows.dim() != 1 or rows.dtype is not torch.int64:
            raise ValueError(f"rows: expected int64 [n], got {rows.dtype} {list(rows.shape)}")
        dtype, shape = sum_dtype(param), (len(rows), param.shape[1])
        if grad is not None and (grad.shape != shape or grad.dtype is not dtype):
            raise ValueError(f"grad: expected {dtype} {list(shape)}, got {grad.dtype} {list(grad.shape)}")

    def run(self) -> None:
        """Updates the rows, in operations of PyTorch."""
        raise NotImplementedError

    def store(self, rows: Tensor, x: Tensor) -> None:
        """Writes rows of the table back, x [n, dim]."""
        store_rows(self.table, rows, x, self.seed, PARAM)
        if self.master is not None:
            self.param.index_copy_(0, rows, x.to(self.param.dtype))


def register_update(name: str, update: type[RowUpdate]) -> None:
    """Registers the operator `name`, whose arguments and whose implementation in PyTorch are `update`'s."""
    register_operator(
        name,
        check=lambda *args: update(*args).check(),
        kernel=lambda *args: update(*args).run(),
        fake=lambda *args: None,
    )


def check_table(name: str, table: Tensor, like: Tensor) -> None:
    """Raises ValueError unless the table is floating point, contiguous and of the shape of `like`."""
    if table.shape != like.shape or table.dim() != 2 or not table.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {list(like.shape)}, got {list(table.shape)}")
    allowed = (torch.float64,) if like.dtype is torch.float64 else (torch.float32, torch.bfloat16)
    if table.dtype not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {table.dtype}")


def check_moments(exp_avg: Tensor, exp_avg_sq: Tensor, table: Tensor) -> None:
    """Raises ValueError for what are not Adam's moments of this table."""
    check_table("exp_avg", exp_avg, table)
    check_table("exp_avg_sq", exp_avg_sq, table)
    if exp_avg.dtype is not exp_avg_sq.dtype:
        raise ValueError(f"exp_avg_sq: expected {exp_avg.dtype} as exp_avg, got {exp_avg_sq.dtype}")


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
