"""The kernels of a search: one finds the best half-keys of a query, from stored scores or from scores computed on the
way, the other makes slots of them.

No score is sorted that need not be. A first pass over the n keys keeps the maximum of each of GROUPS interleaved
groups; the k-th largest of these is a threshold that at least k scores reach, and few more do: about 36 of 1,024 or of
4,096 for k = 32 of 128 groups. A second pass writes those that reach it. A row in which more than CAPACITY exceed the
threshold is scanned again, bisecting the threshold; equal scores alone never cause that.

One int64 holds a score and its index, and sorts by the rule of `product_key_topk`: the larger score first, NaN above
all, -0.0 as 0.0, and of equals the lower index.
"""

import triton
import triton.language as tl


@triton.jit
def ascending(score):
    """fp32 to an int32 that sorts as the score does. No score becomes -2**31: that is what absent keys are."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def pack(ascending_score, index):
    """(int32 of `ascending`, int32 index >= 0) to int64, larger for the better of two."""
    return (ascending_score.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def packed_score(packed):
    """The score of a packed pair, fp32."""
    high = (packed >> 32).to(tl.int32)
    return (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed_index(packed):
    """The index of a packed pair, int32."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def select_half_keys(
    left_row, right, out, row_ok, n_keys, half_dim, left_column, right_key, right_column,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, CAPACITY: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Fills the lists at `out` [ROWS] (pointers): packed (score, key), unsorted, among them the best TOP_K; the rest of
    CAPACITY -2**63.

    COMPUTE: left_row [ROWS] points at queries of half_dim, right at keys [n_keys, half_dim]; otherwise left_row points
    at fp32 scores. Scores are loaded in line, twice: PyTorch takes what a call loads, and a store's address depends on,
    for an argument that the kernel writes, and copies it.
    """
    place = tl.arange(0, CAPACITY)
    maxima = tl.full([ROWS, GROUPS], -2147483648, tl.int32)
    for first in range(0, n_keys, GROUPS):
        key = first + tl.arange(0, GROUPS)
        key_ok = key < n_keys
        if COMPUTE:
            scores = tl.zeros([ROWS, GROUPS], tl.float32)
            for start in range(0, half_dim, DEPTH):
                column = start + tl.arange(0, DEPTH)
                column_ok = column < half_dim
                at = left_row[:, None] + column[None, :] * left_column
                query = tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
                at = right + (column[:, None] * right_column + key[None, :] * right_key)
                keys = tl.load(at, mask=column_ok[:, None] & key_ok[None, :], other=0.0)
                scores = tl.dot(query, keys, scores, input_precision="ieee")
        else:
            at = left_row[:, None] + key[None, :].to(tl.int64) * left_column
            scores = tl.load(at, mask=row_ok[:, None] & key_ok[None, :], other=0.0)
        tile = tl.where(key_ok[None, :], ascending(scores), -2147483648)
        maxima = tl.maximum(maxima, tile)
    best = tl.topk(maxima, PADDED_K)
    threshold = tl.max(tl.where(tl.arange(0, PADDED_K)[None, :] == TOP_K - 1, best, -2147483648), 1)

    # The threshold sought is in low ... high: TOP_K scores reach low, and fewer reach high + 1.
    low = tl.full([ROWS], -2147483647, tl.int32)
    high = tl.max(maxima, 1)
    done = tl.where(row_ok, 0, 1)
    while tl.min(done, 0) == 0:
        above = tl.zeros([ROWS], tl.int32)
        equal = tl.zeros([ROWS], tl.int32)
        for first in range(0, n_keys, GROUPS):
            key = first + tl.arange(0, GROUPS)
            key_ok = key < n_keys
            if COMPUTE:
                scores = tl.zeros([ROWS, GROUPS], tl.float32)
                for start in range(0, half_dim, DEPTH):
                    column = start + tl.arange(0, DEPTH)
                    column_ok = column < half_dim
                    at = left_row[:, None] + column[None, :] * left_column
                    query = tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
                    at = right + (column[:, None] * right_column + key[None, :] * right_key)
                    keys = tl.load(at, mask=column_ok[:, None] & key_ok[None, :], other=0.0)
                    scores = tl.dot(query, keys, scores, input_precision="ieee")
            else:
                at = left_row[:, None] + key[None, :].to(tl.int64) * left_column
                scores = tl.load(at, mask=row_ok[:, None] & key_ok[None, :], other=0.0)
            tile = tl.where(key_ok[None, :], ascending(scores), -2147483648)
            is_above = tile > threshold[:, None]
            is_equal = tile == threshold[:, None]
            counts = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 1)  # both in one scan
            # Those above fill the list from its front, those equal from its back, the lowest key first.
            from_front = above[:, None] + (counts & 0xFFFF) - 1
            from_back = equal[:, None] + (counts >> 16) - 1
            is_kept = (is_above & (from_front < CAPACITY)) | (is_equal & (from_back < TOP_K))
            at = out[:, None] + tl.where(is_above, from_front, CAPACITY - 1 - from_back)
            index = tl.broadcast_to(key[None, :], [ROWS, GROUPS])
            tl.store(at, pack(tile, index), mask=is_kept & (done == 0)[:, None])
            total = tl.max(counts, 1)
            above += total & 0xFFFF
            equal += total >> 16
        filled_back = tl.minimum(equal, TOP_K)
        enough = above + equal >= TOP_K
        fits = enough & (above + filled_back <= CAPACITY)
        gap = (place[None, :] >= above[:, None]) & (place[None, :] < CAPACITY - filled_back[:, None])
        absent = tl.full([ROWS, CAPACITY], -0x8000000000000000, tl.int64)
        tl.store(out[:, None] + place[None, :], absent, mask=gap & (fits & (done == 0))[:, None])
        low = tl.where(enough, tl.where(above >= TOP_K, threshold + 1, threshold), low)
        high = tl.where(enough, high, threshold - 1)
        done = tl.where(fits, 1, done)
        threshold = tl.where(done == 1, threshold, (low >> 1) + (high >> 1) + (low & high & 1))
        tl.debug_barrier()  # the next pass writes where this one did


@triton.jit
def select_stored(
    scores, kept, tokens, heads, n_keys, side_stride, token_stride, head_stride, key_stride,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, CAPACITY: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """kept [2, tokens, heads, CAPACITY] int64, lists of `select_half_keys`, of scores [2, tokens, heads, n_keys] fp32
    at any strides. Grid: (blocks of ROWS tokens * heads, 2).
    """
    token = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    head = (tl.program_id(0) % heads).to(tl.int64)
    side = tl.program_id(1).to(tl.int64)
    row = side * side_stride + token.to(tl.int64) * token_stride + head * head_stride
    out = kept + ((side * tokens + token) * heads + head) * CAPACITY
    select_half_keys(
        scores + row, scores, out, token < tokens, n_keys, 0, key_stride, 0, 0,
        TOP_K, PADDED_K, CAPACITY, GROUPS, ROWS, 16, False,
    )  # fmt: skip


@triton.jit
def select_computed(
    query, half_keys, kept, tokens, heads, n_keys, half_dim, query_side, query_token, query_head, query_column,
    keys_side, keys_head, keys_key, keys_column,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, CAPACITY: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """As `select_stored`, of queries [2, tokens, heads, half_dim] and half_keys [2, heads, n_keys, half_dim]."""
    token = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    head = (tl.program_id(0) % heads).to(tl.int64)
    side = tl.program_id(1).to(tl.int64)
    row = side * query_side + token.to(tl.int64) * query_token + head * query_head
    out = kept + ((side * tokens + token) * heads + head) * CAPACITY
    select_half_keys(
        query + row, half_keys + side * keys_side + head * keys_head, out, token < tokens, n_keys, half_dim,
        query_column, keys_key, keys_column,
        TOP_K, PADDED_K, CAPACITY, GROUPS, ROWS, DEPTH, True,
    )  # fmt: skip


@triton.jit
def rank_candidates(
    kept, weights, slots, rows, n_keys,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, CAPACITY: tl.constexpr, PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Sorts a query's two lists, adds the pairs that can win, keeps the best TOP_K of PAIRS sums of `kept` [2, rows,
    CAPACITY]: slots [rows, TOP_K] int32, and as weights [rows, TOP_K] fp32 their sums or, with SOFTMAX, its softmax.
    Grid: (blocks of ROWS rows,).
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
