"""Block sizes and warps of each kernel, by shape. The sizes of a sum's blocks fix the order in which it is
added up, so they depend on shapes alone: a run repeats another bit for bit.

Chosen by the registers that the compiled kernels take: docs/kernels.md has them, and none spills.
"""

from dataclasses import dataclass

from memcompile.lowering.search.product_key_topk import candidate_pairs


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


# --- search ---------------------------------------------------------------------------------------


def list_sizes(top_k: int) -> dict[str, int]:
    """Of the lists of half-keys: what a query keeps, padded to 2 at least, as `tl.topk` of a list of one does not run,
    and what its list holds.
    """
    padded = max(2, next_power_of_2(top_k))
    return {"TOP_K": top_k, "PADDED_K": padded, "CAPACITY": 2 * padded}


def capacity(top_k: int) -> int:
    """The length of a query's list of half-keys, of each half."""
    return list_sizes(top_k)["CAPACITY"]


def pair_sizes(top_k: int) -> dict[str, int]:
    """Of the pairs of ranks that can win."""
    pairs = len(candidate_pairs(top_k)[0])
    return {"PAIRS": pairs, "PADDED_PAIRS": max(2, next_power_of_2(pairs))}


@dataclass(frozen=True)
class Select:
    """How half-keys are selected: ROWS queries a program, GROUPS keys a step, DEPTH columns a product."""

    rows: int
    groups: int
    depth: int
    num_warps: int
    num_stages: int


def stored_config(top_k: int, n_keys: int) -> Select:
    """Of `select_stored`: a warp a query. Four groups for each key that is kept: then few others pass."""
    kept = list_sizes(top_k)["PADDED_K"]
    groups = max(kept, min(max(128, 4 * kept), next_power_of_2(n_keys)))
    return Select(rows=1, groups=groups, depth=0, num_warps=1 if groups <= 256 else 4, num_stages=1)


# Of `select_computed` by bytes of an element, for few tokens and for many, which share a read of the keys. Half as many
# groups as of stored scores spare registers, and let 44 keys pass instead of 36.
COMPUTING = {
    2: (
        Select(16, 64, 64, num_warps=4, num_stages=1),
        Select(32, 64, 64, num_warps=8, num_stages=2),
        Select(64, 64, 64, num_warps=8, num_stages=2),
    ),
    4: (Select(16, 64, 32, num_warps=4, num_stages=1),),
}
# Of more than 32 keys.
_LONG_LISTS = {2: Select(16, 128, 64, num_warps=8, num_stages=2), 4: Select(16, 128, 32, num_warps=4, num_stages=1)}


def computed_config(top_k: int, n_keys: int, half_dim: int, tokens: int, itemsize: int) -> Select:
    """Of `select_computed`; `tokens` is a hint. What `tl.dot` multiplies has 16 rows, columns and keys at least. Of
    fewer than two groups for each key that is kept, so many keys pass that rows are scanned again and again.
    """
    kept = list_sizes(top_k)["PADDED_K"]
    sizes = COMPUTING[itemsize]
    best = sizes[min(len(sizes) - 1, (tokens > 64) + (tokens > 1024))] if kept <= 32 else _LONG_LISTS[itemsize]
    groups = max(16, kept, min(best.groups, next_power_of_2(n_keys)))
    depth = max(16, min(best.depth, next_power_of_2(half_dim)))
    return Select(best.rows, groups, depth, best.num_warps, best.num_stages)


@dataclass(frozen=True)
class Rank:
    """How `rank_candidates` runs: ROWS queries a program."""

    rows: int
    num_warps: int


# A warp a query: what is sorted then stays in its registers, and `tl.gather` within a warp.
RANK = Rank(rows=1, num_warps=1)


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How a kernel reads rows: BLOCK_HITS rows of BLOCK_COLUMNS elements a step."""

    block_hits: int
    block_columns: int
    num_warps: int


# What `weighted_gather` is autotuned over with max-autotune; the first is what runs otherwise, at many tokens.
GATHERING = (
    Rows(8, 512, num_warps=4),
    Rows(16, 512, num_warps=8),
    Rows(4, 1024, num_warps=4),
    Rows(8, 1024, num_warps=8),
    Rows(16, 256, num_warps=4),
    Rows(16, 128, num_warps=2),
    Rows(32, 64, num_warps=2),
)


def gather_configs(tokens: int, value_dim: int) -> list[Rows]:
    """Those of `GATHERING` that suit rows of value_dim, the one to run unmeasured first; `tokens` is a hint."""
    width = next_power_of_2(value_dim)
    fitting = [config for config in GATHERING if config.block_columns <= width]
    if not fitting:
        return [Rows(32, max(8, width), num_warps=2)]
    # Few tokens: the rows are cut finer, until every multiprocessor has a program or two. Of none nothing is known.
    enough = [c for c in fitting if tokens == 0 or tokens * -(-value_dim // c.block_columns) >= 256]
    best = enough[0] if enough else min(fitting, key=lambda config: config.block_columns)
    return [best, *(config for config in fitting if config is not best)]


def dot_config(value_dim: int) -> Rows:
    """Of `gather_dot_rows`."""
    width = next_power_of_2(value_dim)
    return Rows(8, min(512, max(8, width)), num_warps=4 if width > 256 else 2)


@dataclass(frozen=True)
class Sum:
    """How rows are added to slots: CHUNK sorted hits a program, BLOCK_COLUMNS columns."""

    chunk: int
    block_columns: int
    num_warps: int


def sum_config(value_dim: int, total: int) -> Sum:
    """Of the kernels of `weighted_scatter`; `total`, how many hits are summed, is a hint. Long chunks leave few partial
    sums, short ones give few hits to many programs.
    """
    chunk = min(256, max(16, next_power_of_2(total // 4096)))
    return Sum(chunk, min(256, max(8, next_power_of_2(value_dim))), num_warps=1)


# --- rows updated in place ------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How rows are updated: ROWS of them a program, BLOCK_COLUMNS columns."""

    rows: int
    block_columns: int
    num_warps: int


# Of sums, 16 a thread. Narrow rows share a warp and no more: each row of a thread takes registers for its own numbers.
_BYTES_A_WARP = 512


def update_config(value_dim: int, itemsize: int) -> Tile:
    """Of the kernels that update each number by itself; `itemsize` is of their sums."""
    a_warp = _BYTES_A_WARP // itemsize
    width = min(8 * a_warp, max(16, next_power_of_2(value_dim)))
    return Tile(max(1, min(4, a_warp // width)), width, num_warps=max(1, width // a_warp))


def adagrad_config(value_dim: int, itemsize: int) -> Tile:
    """Of `update_adagrad`, whose program has all of a row while 16 KiB hold it."""
    a_warp = _BYTES_A_WARP // itemsize
    width = min(32 * a_warp, max(16, next_power_of_2(value_dim)))
    return Tile(max(1, min(4, a_warp // width)), width, num_warps=min(8, max(1, width // a_warp)))
