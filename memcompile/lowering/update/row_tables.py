"""What the operators on rows of tables share: how they are registered, and rows in and out of tables.

An operator that updates rows in place reads and writes the rows that it is given and no others. Its `values` are the
table that learns, its `rounded` a bf16 copy of fp32 values, or None. Rows must be distinct. It returns nothing. A row
that the table does not have raises, but on a GPU, where Triton's kernels leave it out: they do not wait to know.

Its gradient `grad` is [n, dim] in the dtype that rows are updated in. Or it is in factors, and is nowhere as a whole:
with `rows`, `ends` and `hits` of `hits_by_row` and `weights` [tokens, hits], `grad` is that of the tokens, [tokens,
dim], and row i moves by what `row_sums` has for it. Layers that share a table have their tokens one behind the other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memcompile.lowering.gather.hits import sum_dtype, sums_of_runs
from memcompile.lowering.register.dispatch import anywhere
from memcompile.lowering.register.schema import LIBRARY, NAMESPACE
from memcompile.lowering.triton.serve import row_kernel
from memcompile.lowering.update.stochastic_rounding import round_rows

VALUES, EXP_AVG, EXP_AVG_SQ = range(3)  # the tables of a step, which round apart
_CHUNK_ELEMENTS = 2**20  # of one table that the PyTorch operators hold at once


def check_table(name: str, table: Tensor, like: Tensor) -> None:
    """Raises ValueError unless the table is floating point, contiguous and of the shape of `like`."""
    if table.shape != like.shape or table.dim() != 2 or not table.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {list(like.shape)}, got {list(table.shape)}")
    allowed = (torch.float64,) if like.dtype is torch.float64 else (torch.float32, torch.bfloat16)
    if table.dtype not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {table.dtype}")


def check_moments(exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor) -> None:
    """Raises ValueError for what are not Adam's moments of these values."""
    check_table("exp_avg", exp_avg, values)
    check_table("exp_avg_sq", exp_avg_sq, values)
    if exp_avg.dtype is not exp_avg_sq.dtype:
        raise ValueError(f"exp_avg_sq: expected {exp_avg.dtype} as exp_avg, got {exp_avg_sq.dtype}")


def check_rows(values: Tensor, rounded: Tensor | None, rows: Tensor) -> None:
    """Raises ValueError for what no operator on rows takes."""
    check_table("values", values, values)
    if rounded is not None and (
        rounded.shape != values.shape or rounded.dtype is not torch.bfloat16 or not rounded.is_contiguous()
    ):
        raise ValueError(
            f"rounded: expected contiguous bfloat16 {list(values.shape)}, got {rounded.dtype} {list(rounded.shape)}"
        )
    if rounded is not None and values.dtype is not torch.float32:
        raise ValueError(f"values: expected float32 beside a rounded copy, got {values.dtype}")
    if rows.dim() != 1 or rows.dtype is not torch.int64:
        raise ValueError(f"rows: expected int64 [n], got {rows.dtype} {list(rows.shape)}")


@dataclass(frozen=True)
class Gradient:
    """The gradient of an update's rows, whole or in factors: see the top of this file."""

    grad: Tensor
    ends: Tensor | None = None
    hits: Tensor | None = None
    weights: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The last arguments of an update: `ends`, `hits` and `weights`."""
        return self.ends, self.hits, self.weights

    @staticmethod
    def check(
        values: Tensor,
        rows: Tensor,
        grad: Tensor | None,
        ends: Tensor | None,
        hits: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Raises ValueError for what is not a gradient of these rows."""
        dtype, dim, count = sum_dtype(values), values.shape[1], len(rows)
        if ends is None or hits is None or weights is None:
            if not (ends is None and hits is None and weights is None):
                raise ValueError("ends, hits and weights: expected all of them or none")
            if grad is not None and (grad.shape != (count, dim) or grad.dtype is not dtype):
                raise ValueError(f"grad: expected {dtype} {[count, dim]}, got {grad.dtype} {list(grad.shape)}")
            return
        if weights.dim() != 2 or not weights.is_floating_point():
            raise ValueError(
                f"weights: expected floating point [tokens, hits], got {weights.dtype} {list(weights.shape)}"
            )
        if (
            grad is None
            or grad.shape != (len(weights), dim)
            or not grad.is_floating_point()
            or sum_dtype(grad) is not dtype
        ):
            got = "None" if grad is None else f"{grad.dtype} {list(grad.shape)}"
            raise ValueError(f"grad: expected {[len(weights), dim]} whose sums are {dtype}, got {got}")
        for name, tensor, size in (("ends", ends, count + 1), ("hits", hits, hits.numel())):
            if tensor.shape != (size,) or tensor.dtype is not torch.int64:
                raise ValueError(f"{name}: expected int64 {[size]}, got {tensor.dtype} {list(tensor.shape)}")

    def of(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Of some of the rows, [n, dim]."""
        if self.ends is None or self.hits is None or self.weights is None:
            return self.grad[part]
        ends = self.ends[part.start : part.stop + 1]
        return sums_of_runs(ends - ends[0], self.hits[ends[0] : ends[-1]], self.weights, self.grad).to(dtype)


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


def store_values(values: Tensor, rounded: Tensor | None, rows: Tensor, x: Tensor, seed: int) -> None:
    """Writes the values back, and their rounded copy to the nearest bf16."""
    store_rows(values, rows, x, seed, VALUES)
    if rounded is not None:
        rounded.index_copy_(0, rows, x.to(rounded.dtype))


def register_row_operator(
    name: str, check: Callable[..., None], kernel: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> None:
    """Gives the operator `name` of `schema.SCHEMAS` its PyTorch operators and its fake. It has no derivative.

    Args:
        check: raises ValueError for arguments that the operator cannot serve.
        kernel: the operator, in operations of PyTorch; `anywhere` tells what runs in its place.
        fake: shapes and dtypes of what it returns, if anything.
    """

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args) if fake else None

    run_anywhere = anywhere(name, check, kernel, row_kernel)
    LIBRARY.impl(name, run_anywhere, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=LIBRARY)
