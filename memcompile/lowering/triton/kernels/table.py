"""The kernels that read rows of the table, `weighted_gather` and `gather_dot`, and those that add token rows to the
slots that read them, `weighted_scatter`. Bound by memory bandwidth.

Sums are deterministic: hits are sorted by slot, so a slot's hits are a segment. A program sums CHUNK sorted hits,
whatever their slots, so that a slot that all tokens hit costs no more than others. A segment that lies within a chunk
goes straight to its row; of one that crosses, each chunk leaves a partial sum, which a second kernel adds up in their
order. Or with fp32 atomics, where a run need not repeat another bit for bit. Slots are taken as they are: one that the
table does not have is read or written all the same. -2**31 stands for the slot before the first and past the last.
"""

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


@triton.jit
def sum_chunks(
    ranked, tokens, weights, grad, out, begun, left_open, total, value_dim, grad_row, grad_column,
    CHUNK: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Per chunk of sorted hits: the rows of out [slots, value_dim] whose segments lie within it; `begun` [chunks,
    value_dim] fp32, what it adds to the segment that an earlier chunk began; `left_open`, to the one it leaves open.

    Of each hit, by slot: ranked [total], its slot, tokens [total] and weights [total]. grad is [tokens, value_dim].
    Grid: (chunks, blocks of columns).
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_ok = column < value_dim
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, total)
    slot = tl.load(ranked + first).to(tl.int64)
    starts_here = tl.load(ranked + first - 1, mask=first > 0, other=-2147483648).to(tl.int64) != slot
    ends = slot != slot
    sums = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for step in range(0, last - first):
        position = first + step
        following = tl.load(ranked + position + 1, mask=position + 1 < total, other=-2147483648).to(tl.int64)
        token = tl.load(tokens + position).to(tl.int64)
        weight = tl.load(weights + position).to(tl.float32)
        row = tl.load(grad + token * grad_row + column * grad_column, mask=column_ok, other=0.0)
        sums += weight * row.to(tl.float32)
        ends = following != slot
        whole = tl.where(ends & starts_here, value_dim, 0)  # columns to store: all or none
        tl.store(out + slot * value_dim + column, sums.to(out.dtype.element_ty), mask=column < whole)
        late = tl.where(ends & ~starts_here, value_dim, 0)
        tl.store(begun + chunk * value_dim + column, sums, mask=column < late)
        sums = tl.where(ends, 0.0, sums)
        starts_here = starts_here | ends
        slot = following
    early = tl.where(~ends & starts_here, value_dim, 0)
    tl.store(left_open + chunk * value_dim + column, sums, mask=column < early)
    through = tl.where(~ends & ~starts_here, value_dim, 0)
    tl.store(begun + chunk * value_dim + column, sums, mask=column < through)


@triton.jit
def join_chunks(
    ranked, out, begun, left_open, total, value_dim, CHUNK: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows of out [slots, value_dim] whose segments cross chunks, from the partial sums of `sum_chunks`. Same grid."""
    chunk = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_ok = column < value_dim
    first = chunk * CHUNK
    following = first + CHUNK
    slot = tl.load(ranked + tl.minimum(following, total) - 1).to(tl.int64)
    is_open = tl.load(ranked + following, mask=following < total, other=-2147483648).to(tl.int64) == slot
    before = tl.load(ranked + first - 1, mask=first > 0, other=-2147483648).to(tl.int64)
    if is_open & (before != slot):  # sorted: where the hit before the chunk is of another slot, the segment starts here
        sums = tl.load(left_open + chunk * value_dim + column, mask=column_ok, other=0.0)
        while tl.load(ranked + following, mask=following < total, other=-2147483648).to(tl.int64) == slot:
            sums += tl.load(begun + (following // CHUNK) * value_dim + column, mask=column_ok, other=0.0)
            following += CHUNK
        tl.store(out + slot * value_dim + column, sums.to(out.dtype.element_ty), mask=column_ok)


@triton.jit
def add_atomically(
    slots, weights, grad, out, hits, value_dim, grad_row, grad_column, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """out [slots, value_dim] fp32 += weights[token, h] * grad[token] at slots[token, h], of grad [tokens, value_dim].
    Grid: (tokens, blocks of columns).
    """
    token = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_ok = column < value_dim
    row = tl.load(grad + token * grad_row + column * grad_column, mask=column_ok, other=0.0).to(tl.float32)
    for h in range(0, hits):
        slot = tl.load(slots + token * hits + h).to(tl.int64)
        weight = tl.load(weights + token * hits + h).to(tl.float32)
        tl.atomic_add(out + slot * value_dim + column, weight * row, mask=column_ok, sem="relaxed")
