"""The kernels that find the best half-keys of a query, from stored scores or from scores computed on the way.

No score is sorted that need not be. A first pass over the n keys keeps the maximum of each of GROUPS interleaved
groups; the k-th largest of these is a threshold that at least k scores reach, and few more do: about 36 of 1,024 or of
4,096 for k = 32 of 128 groups. A second pass writes those that reach it. A row in which more than CAPACITY exceed the
threshold is scanned again, bisecting the threshold; equal scores alone never cause that.
"""

import triton
import triton.language as tl

from memcompile.lowering.triton.kernels.ordering import ascending, pack


@triton.jit
def select_half_keys(
    left_row, right, out, row_ok, n_keys, half_dim, left_column, right_key, right_column,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, CAPACITY: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, COMPUTE: tl.constexpr, WIDEN: tl.constexpr,
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
                if WIDEN:  # Triton's interpreter multiplies bf16 wrongly
                    query, keys = query.to(tl.float32), keys.to(tl.float32)
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
                    if WIDEN:  # Triton's interpreter multiplies bf16 wrongly
                        query, keys = query.to(tl.float32), keys.to(tl.float32)
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
        TOP_K, PADDED_K, CAPACITY, GROUPS, ROWS, 16, False, False,
    )  # fmt: skip


@triton.jit
def select_computed(
    query, half_keys, kept, tokens, heads, n_keys, half_dim, query_side, query_token, query_head, query_column,
    keys_side, keys_head, keys_key, keys_column,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, CAPACITY: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, WIDEN: tl.constexpr,
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
        TOP_K, PADDED_K, CAPACITY, GROUPS, ROWS, DEPTH, True, WIDEN,
    )  # fmt: skip
