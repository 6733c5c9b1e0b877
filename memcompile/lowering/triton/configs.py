"""Block sizes and warps of each kernel, by shape. The sizes of a sum's blocks fix the order in which it is
added up, so they depend on shapes alone: a run repeats another bit for bit.

Chosen by the registers that the compiled kernels take: docs/kernels.md has them, and none spills.
"""

from memcompile.lowering.search.product_key_topk import candidate_pairs

Config = dict[str, int]  # of a launch: the kernel's constants, in capitals, and its warps and stages


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


# --- search: ROWS queries a program, GROUPS keys a step, DEPTH columns a product ------------------


def list_sizes(top_k: int) -> Config:
    """Of the lists of half-keys: what a query keeps, padded to 2 at least, as `tl.topk` of a list of one does not run,
    and what its list of each half holds.
    """
    padded = max(2, next_power_of_2(top_k))
    return {"TOP_K": top_k, "PADDED_K": padded, "CAPACITY": 2 * padded}


def stored_config(top_k: int, n_keys: int) -> Config:
    """Of `select_stored`: a warp a query. Four groups for each key that is kept: then few others pass."""
    lists = list_sizes(top_k)
    kept = lists["PADDED_K"]
    groups = max(kept, min(max(128, 4 * kept), next_power_of_2(n_keys)))
    return lists | {"GROUPS": groups, "ROWS": 1, "num_warps": 1 if groups <= 256 else 4, "num_stages": 1}


# Rows, groups, depth, warps and stages of `select_computed` by bytes of an element, for few tokens and for many, which
# share a read of the keys. Half as many groups as of stored scores spare registers, and let 44 keys pass instead of 36.
_COMPUTING = {2: ((16, 64, 64, 4, 1), (32, 64, 64, 8, 2), (64, 64, 64, 8, 2)), 4: ((16, 64, 32, 4, 1),)}
_LONG_LISTS = {2: (16, 128, 64, 8, 2), 4: (16, 128, 32, 4, 1)}  # of more than 32 keys


def computed_config(top_k: int, n_keys: int, half_dim: int, tokens: int, itemsize: int) -> Config:
    """Of `select_computed`; `tokens` is a hint. What `tl.dot` multiplies has 16 rows, columns and keys at least. Of
    fewer than two groups for each key that is kept, so many keys pass that rows are scanned again and again.
    """
    lists = list_sizes(top_k)
    kept, sizes = lists["PADDED_K"], _COMPUTING[itemsize]
    best = sizes[min(len(sizes) - 1, (tokens > 64) + (tokens > 1024))] if kept <= 32 else _LONG_LISTS[itemsize]
    rows, most_groups, most_depth, num_warps, num_stages = best
    groups = max(16, kept, min(most_groups, next_power_of_2(n_keys)))
    depth = max(16, min(most_depth, next_power_of_2(half_dim)))
    return lists | {"GROUPS": groups, "ROWS": rows, "DEPTH": depth, "num_warps": num_warps, "num_stages": num_stages}


def rank_config(top_k: int) -> Config:
    """Of `rank_candidates`, with the pairs of ranks that can win. A warp a query: what is sorted then stays in its
    registers, and `tl.gather` within a warp.
    """
    pairs = len(candidate_pairs(top_k)[0])
    padded = max(2, next_power_of_2(pairs))
    return list_sizes(top_k) | {"PAIRS": pairs, "PADDED_PAIRS": padded, "ROWS": 1, "num_warps": 1}


# --- the table: rows of BLOCK_COLUMNS elements ----------------------------------------------------


def _rows(block_hits: int, block_columns: int, num_warps: int) -> Config:
    """How a kernel reads rows: BLOCK_HITS of them a step."""
    return {"BLOCK_HITS": block_hits, "BLOCK_COLUMNS": block_columns, "num_warps": num_warps}


# What `weighted_gather` is autotuned over with max-autotune; the first is what runs otherwise, at many tokens.
_SHAPES = ((8, 512, 4), (16, 512, 8), (4, 1024, 4), (8, 1024, 8), (16, 256, 4), (16, 128, 2), (32, 64, 2))
GATHERING = [_rows(*shape) for shape in _SHAPES]


def gather_configs(tokens: int, value_dim: int) -> list[Config]:
    """Those of `GATHERING` that suit rows of value_dim, the one to run unmeasured first; `tokens` is a hint."""
    width = next_power_of_2(value_dim)
    fitting = [config for config in GATHERING if config["BLOCK_COLUMNS"] <= width]
    if not fitting:
        return [_rows(32, max(8, width), num_warps=2)]
    # Few tokens: the rows are cut finer, until every multiprocessor has a program or two. Of none nothing is known.
    enough = [c for c in fitting if tokens == 0 or tokens * -(-value_dim // c["BLOCK_COLUMNS"]) >= 256]
    best = enough[0] if enough else min(fitting, key=lambda config: config["BLOCK_COLUMNS"])
    return [best, *(config for config in fitting if config is not best)]


def dot_config(value_dim: int) -> Config:
    """Of `gather_dot_rows`."""
    width = next_power_of_2(value_dim)
    return _rows(8, min(512, max(8, width)), num_warps=4 if width > 256 else 2)


def pair_config(dotted: int, summed: int) -> Config:
    """Of the kernels of pairs: dots with `dotted` columns of a row, BLOCK_COLUMNS a step, decide how SUMMED of the
    `summed` ones are added up.
    """
    width = min(2048, max(8, next_power_of_2(summed)))
    hits = max(4, min(16, 8192 // width))
    columns = min(512, 4096 // hits, max(8, next_power_of_2(dotted)))
    return _rows(hits, columns, num_warps=8 if width > 128 else 4) | {"SUMMED": width}


def sum_config(value_dim: int, total: int) -> Config:
    """Of the kernels of `weighted_scatter`, CHUNK sorted hits a program; `total`, how many hits are summed, is a hint.
    Long chunks leave few partial sums, short ones give few hits to many programs.
    """
    chunk = min(256, max(16, next_power_of_2(total // 4096)))
    return {"CHUNK": chunk, "BLOCK_COLUMNS": min(256, max(8, next_power_of_2(value_dim))), "num_warps": 1}


def update_config(value_dim: int, itemsize: int, whole_rows: bool = False) -> Config:
    """Of the kernels that update ROWS rows of tables a program; `itemsize` is of their sums. With `whole_rows` a
    program has all of a row while 16 KiB hold it.
    """
    # Of sums, 16 a thread. Narrow rows share a warp and no more: each row of a thread takes registers for its numbers.
    a_warp = 512 // itemsize
    width = min((32 if whole_rows else 8) * a_warp, max(16, next_power_of_2(value_dim)))
    num_warps = min(8, max(1, width // a_warp))
    return {"ROWS": max(1, min(4, a_warp // width)), "BLOCK_COLUMNS": width, "num_warps": num_warps}
