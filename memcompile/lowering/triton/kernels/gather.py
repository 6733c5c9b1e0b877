"""The kernels that read rows of the table: `weighted_gather` and `gather_dot`. Bound by memory bandwidth."""

import triton
import triton.language as tl


@triton.jit
def weighted_sum(
    values, slots, weights, hits, column, column_ok, value_row, value_column,
    BLOCK_HITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum over a token's hits of weight * values[slot, column]: [BLOCK_COLUMNS] fp32. Rows are added up across
    BLOCK_HITS lanes, reduced once at the end, so that no step of the loop waits for another.
    """
    sums = tl.zeros([BLOCK_HITS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, hits, BLOCK_HITS):
        hit = start + tl.arange(0, BLOCK_HITS)
        hit_ok = hit < hits
        slot = tl.load(slots + hit, mask=hit_ok, other=0).to(tl.int64)
        weight = tl.load(weights + hit, mask=hit_ok, other=0.0).to(tl.float32)
        at = values + slot[:, None] * value_row + column.to(tl.int64)[None, :] * value_column
        rows = tl.load(at, mask=hit_ok[:, None] & column_ok[None, :], other=0.0)
        sums += weight[:, None] * rows.to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit
def weighted_gather_rows(
    values, slots, weights, out, hits, value_dim, value_row, value_column,
    BLOCK_HITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [tokens, value_dim] of slots and weights [tokens, hits]. Grid: (tokens, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_ok = column < value_dim
    sums = weighted_sum(
        values, slots + token * hits, weights + token * hits, hits, column, column_ok, value_row, value_column,
        BLOCK_HITS, BLOCK_COLUMNS,
    )  # fmt: skip
    tl.store(out + token * value_dim + column, sums.to(out.dtype.element_ty), mask=column_ok)


@triton.jit
def gather_dot_rows(
    values, slots, grad, dots, hits, value_dim, value_row, value_column, grad_row, grad_column,
    BLOCK_HITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dots [tokens, hits] = values[slot] . grad[token], grad [tokens, value_dim]. Grid: (tokens, blocks of hits)."""
    token = tl.program_id(0).to(tl.int64)
    hit = tl.program_id(1) * BLOCK_HITS + tl.arange(0, BLOCK_HITS)
    hit_ok = hit < hits
    slot = tl.load(slots + token * hits + hit, mask=hit_ok, other=0).to(tl.int64)
    sums = tl.zeros([BLOCK_HITS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, value_dim, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        column_ok = column < value_dim
        wide = column.to(tl.int64)
        g = tl.load(grad + token * grad_row + wide * grad_column, mask=column_ok, other=0.0)
        at = values + slot[:, None] * value_row + wide[None, :] * value_column
        rows = tl.load(at, mask=hit_ok[:, None] & column_ok[None, :], other=0.0)
        sums += rows.to(tl.float32) * g.to(tl.float32)[None, :]
    tl.store(dots + token * hits + hit, tl.sum(sums, 1), mask=hit_ok)
