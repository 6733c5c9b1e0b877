"""The kernels that add token rows to the slots that read them: `weighted_scatter`.

Deterministic: hits are sorted by slot, so a slot's hits are a segment. A program sums CHUNK sorted hits, whatever their
slots, so that a slot that all tokens hit costs no more than others. A segment that lies within a chunk goes straight to
its row; of one that crosses, each chunk leaves a partial sum, which a second kernel adds up in their order.

Or with fp32 atomics, where a run need not repeat another bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def sum_chunks(
    ranked, order, weights, grad, out, begun, left_open, total, hits, value_dim, grad_row, grad_column,
    CHUNK: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Per chunk of sorted hits: the rows of out [slots, value_dim] whose segments lie within it; `begun` [chunks,
    value_dim] fp32, what it adds to the segment that an earlier chunk began; `left_open`, to the one it leaves open.

    ranked [total] are slots, ascending; order [total] the hit (token * hits + h) that each was; weights [tokens, hits];
    grad [tokens, value_dim]. Grid: (chunks, blocks of columns).
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    column_ok = column < value_dim
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, total)
    slot = tl.load(ranked + first).to(tl.int64)
    starts_here = (tl.load(ranked + first - 1, mask=first > 0, other=-1).to(tl.int64) != slot).to(tl.int32)
    ends = tl.zeros([], tl.int32)
    sums = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for position in range(first, last):
        following = tl.load(ranked + position + 1, mask=position + 1 < total, other=-1).to(tl.int64)
        hit = tl.load(order + position).to(tl.int64)
        weight = tl.load(weights + hit).to(tl.float32)
        row = tl.load(grad + (hit // hits) * grad_row + column * grad_column, mask=column_ok, other=0.0)
        sums += weight * row.to(tl.float32)
        ends = (following != slot).to(tl.int32)
        is_whole = (ends & starts_here) == 1
        is_begun = (ends & (1 - starts_here)) == 1
        tl.store(out + slot * value_dim + column, sums.to(out.dtype.element_ty), mask=column_ok & is_whole)
        tl.store(begun + chunk * value_dim + column, sums, mask=column_ok & is_begun)
        sums = tl.where(ends == 1, 0.0, sums)
        starts_here = starts_here | ends
        slot = following
    is_open = ends == 0
    tl.store(left_open + chunk * value_dim + column, sums, mask=column_ok & is_open & (starts_here == 1))
    tl.store(begun + chunk * value_dim + column, sums, mask=column_ok & is_open & (starts_here == 0))


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
    slot = tl.load(ranked + following - 1, mask=following < total, other=-1).to(tl.int64)
    is_open = tl.load(ranked + following, mask=following < total, other=-2).to(tl.int64) == slot
    before = tl.load(ranked + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if is_open & (before != slot):  # sorted: where the hit before the chunk is of another slot, the segment starts here
        sums = tl.load(left_open + chunk * value_dim + column, mask=column_ok, other=0.0)
        while tl.load(ranked + following, mask=following < total, other=-1).to(tl.int64) == slot:
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
