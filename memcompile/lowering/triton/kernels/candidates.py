"""The kernel that makes slots of half-keys: sorts a query's two lists, adds the pairs that can win, keeps the best."""

import triton
import triton.language as tl

from memcompile.lowering.triton.kernels.ordering import ascending, pack, packed_index, packed_score


@triton.jit
def rank_candidates(
    kept, weights, slots, rows, n_keys,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, CAPACITY: tl.constexpr, PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """The best TOP_K of PAIRS sums of `kept` [2, rows, CAPACITY]: slots [rows, TOP_K] int32, and as weights
    [rows, TOP_K] fp32 their sums or, with SOFTMAX, its softmax. Grid: (blocks of ROWS rows,).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    place = tl.arange(0, CAPACITY)[None, :]
    at = kept + row.to(tl.int64)[:, None] * CAPACITY + place
    first = tl.topk(tl.load(at, mask=row_ok[:, None], other=0), PADDED_K)
    at = kept + (row + rows).to(tl.int64)[:, None] * CAPACITY + place
    second = tl.topk(tl.load(at, mask=row_ok[:, None], other=0), PADDED_K)

    # Pair p is of ranks (a, b) with (a + 1) * (b + 1) <= TOP_K, ordered by a, then by b; `begin` is a's first pair.
    pair = tl.arange(0, PADDED_PAIRS)
    rank_a = tl.zeros([PADDED_PAIRS], tl.int32)
    begin_of_a = tl.zeros([PADDED_PAIRS], tl.int32)
    begin = 0
    for a in tl.static_range(1, TOP_K):
        begin += TOP_K // a
        rank_a += (pair >= begin).to(tl.int32)
        begin_of_a = tl.where(pair >= begin, begin, begin_of_a)
    pair_ok = pair < PAIRS
    rank_b = tl.where(pair_ok, pair - begin_of_a, 0)
    rank_a = tl.broadcast_to(rank_a[None, :], [ROWS, PADDED_PAIRS])
    rank_b = tl.broadcast_to(rank_b[None, :], [ROWS, PADDED_PAIRS])

    sums = tl.gather(packed_score(first), rank_a, 1) + tl.gather(packed_score(second), rank_b, 1)
    candidates = pack(ascending(sums), tl.broadcast_to(pair[None, :], [ROWS, PADDED_PAIRS]))
    absent = tl.full([ROWS, PADDED_PAIRS], -0x8000000000000000, tl.int64)
    best = tl.topk(tl.where(pair_ok[None, :], candidates, absent), PADDED_K)

    column = tl.arange(0, PADDED_K)[None, :]
    hit_ok = row_ok[:, None] & (column < TOP_K)
    result = packed_score(best)
    if SOFTMAX:
        # Not tl.max, which passes over NaN: the best stands first.
        peak = tl.sum(tl.where(column == 0, result, 0.0), 1)
        power = tl.where(column < TOP_K, tl.exp(result - peak[:, None]), 0.0)
        result = power / tl.sum(power, 1)[:, None]
    hit = packed_index(best) & (PADDED_PAIRS - 1)
    i = tl.gather(packed_index(first), tl.gather(rank_a, hit, 1), 1)
    j = tl.gather(packed_index(second), tl.gather(rank_b, hit, 1), 1)
    at = row.to(tl.int64)[:, None] * TOP_K + column
    tl.store(weights + at, result, mask=hit_ok)
    tl.store(slots + at, i * n_keys + j, mask=hit_ok)
