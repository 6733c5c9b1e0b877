"""The kernels of a table of pairs (u, v), `pair_gather` and `pair_grads`. A program has a token, and reads each of its
rows once: the half whose dots are taken, then up to SUMMED columns of the other. Where there are more columns there are
more programs, each of which takes the dots anew. Bound by memory bandwidth.
"""

import triton
import triton.language as tl


@triton.jit
def _dots(
    values, vector, slot, hit_ok, first, columns, value_row, value_column, vector_column,
    BLOCK_HITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_HITS] fp32: of rows `slot`, their columns first .. first + columns, with the vector [columns]."""
    sums = tl.zeros([BLOCK_HITS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        column_ok = column < columns
        wide = column.to(tl.int64)
        y = tl.load(vector + wide * vector_column, mask=column_ok, other=0.0)
        at = values + slot[:, None] * value_row + (first + wide)[None, :] * value_column
        rows = tl.load(at, mask=hit_ok[:, None] & column_ok[None, :], other=0.0)
        sums += rows.to(tl.float32) * y.to(tl.float32)[None, :]
    return tl.sum(sums, 1)


@triton.jit
def _rows(values, slot, hit_ok, first, column, column_ok, value_row, value_column):
    """[hits, columns] fp32: of rows `slot`, their columns first + column."""
    at = values + slot[:, None] * value_row + (first + column.to(tl.int64))[None, :] * value_column
    return tl.load(at, mask=hit_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def _below(z):
    """The normal distribution function."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def pair_gather_rows(
    values, slots, weights, x, out, dots, hits, d, value_dim, value_row, value_column, x_row, x_column,
    BLOCK_HITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """out [tokens, value_dim] and dots [tokens, hits] of slots and weights [tokens, hits] and x [tokens, d].
    Grid: (tokens, blocks of columns of out).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SUMMED + tl.arange(0, SUMMED)
    column_ok = column < value_dim
    sums = tl.zeros([BLOCK_HITS, SUMMED], tl.float32)
    for start in range(0, hits, BLOCK_HITS):
        hit = start + tl.arange(0, BLOCK_HITS)
        hit_ok = hit < hits
        slot = tl.load(slots + token * hits + hit, mask=hit_ok, other=0).to(tl.int64)
        weight = tl.load(weights + token * hits + hit, mask=hit_ok, other=0.0).to(tl.float32)
        z = _dots(
            values, x + token * x_row, slot, hit_ok, 0, d, value_row, value_column, x_column, BLOCK_HITS, BLOCK_COLUMNS
        )
        tl.store(dots + token * hits + hit, z, mask=hit_ok & (tl.program_id(1) == 0))
        v = _rows(values, slot, hit_ok, d, column, column_ok, value_row, value_column)
        sums += (weight * z * _below(z))[:, None] * v
    tl.store(out + token * value_dim + column, tl.sum(sums, 0).to(out.dtype.element_ty), mask=column_ok)


@triton.jit
def pair_grads_rows(
    values, slots, weights, dots, grad, grad_weights, grad_x, into, out, hits, d, value_dim, value_row, value_column,
    grad_row, grad_column,
    BLOCK_HITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """grad_weights, into and out [tokens, hits], and grad_x [tokens, d], of slots, weights and dots [tokens, hits] and
    grad [tokens, value_dim]. Grid: (tokens, blocks of columns of grad_x).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SUMMED + tl.arange(0, SUMMED)
    column_ok = column < d
    sums = tl.zeros([BLOCK_HITS, SUMMED], tl.float32)
    for start in range(0, hits, BLOCK_HITS):
        hit = start + tl.arange(0, BLOCK_HITS)
        hit_ok = hit < hits
        place = token * hits + hit
        slot = tl.load(slots + place, mask=hit_ok, other=0).to(tl.int64)
        weight = tl.load(weights + place, mask=hit_ok, other=0.0).to(tl.float32)
        z = tl.load(dots + place, mask=hit_ok, other=0.0)
        along = _dots(
            values, grad + token * grad_row, slot, hit_ok, d, value_dim, value_row, value_column, grad_column,
            BLOCK_HITS, BLOCK_COLUMNS,
        )  # fmt: skip
        below = _below(z)
        coefficient = weight * (below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327) * along
        stores = hit_ok & (tl.program_id(1) == 0)
        tl.store(grad_weights + place, z * below * along, mask=stores)
        tl.store(into + place, coefficient, mask=stores)
        tl.store(out + place, weight * z * below, mask=stores)
        sums += coefficient[:, None] * _rows(values, slot, hit_ok, 0, column, column_ok, value_row, value_column)
    tl.store(grad_x + token * d + column, tl.sum(sums, 0).to(grad_x.dtype.element_ty), mask=column_ok)
