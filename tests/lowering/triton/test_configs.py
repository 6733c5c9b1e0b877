"""Block sizes: what Triton and the kernels ask of them, for any shape that is served."""

from hypothesis import given
from hypothesis import strategies as st

from memcompile.lowering.search.product_key_topk import candidate_pairs
from memcompile.lowering.triton import configs
from memcompile.lowering.triton.support import MAX_TOP_K

top_ks = st.integers(1, MAX_TOP_K)
value_dims = st.one_of(st.integers(1, 5000), st.integers(1, 2**20))
token_hints = st.integers(0, 2**24)
itemsizes = st.sampled_from([2, 4])


def is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@given(st.integers(0, 2**40))
def test_next_power_of_2(number):
    power = configs.next_power_of_2(number)
    assert is_power_of_2(power) and power >= number and (power == 1 or power // 2 < number)


@given(top_ks)
def test_lists_and_pairs(top_k):
    lists, pairs = configs.list_sizes(top_k), configs.rank_config(top_k)
    assert is_power_of_2(lists["PADDED_K"]) and lists["PADDED_K"] >= max(2, top_k)
    assert is_power_of_2(lists["CAPACITY"]) and lists["CAPACITY"] >= 2 * top_k  # the kernel bisects until a list fits
    for config in (pairs, configs.stored_config(top_k, 1024), configs.computed_config(top_k, 1024, 64, 512, 2)):
        assert config | lists == config  # the kernels share them
    assert pairs["PAIRS"] == len(candidate_pairs(top_k)[0]) <= pairs["PADDED_PAIRS"]
    # `tl.topk` of the pairs keeps PADDED_K of them, and an index of a pair is masked by PADDED_PAIRS - 1.
    assert is_power_of_2(pairs["PADDED_PAIRS"]) and pairs["PADDED_PAIRS"] >= lists["PADDED_K"]


@given(top_ks, st.integers(1, 46_340))
def test_select_stored(top_k, n_keys):
    n_keys = max(n_keys, top_k)
    config = configs.stored_config(top_k, n_keys)
    assert is_power_of_2(config["GROUPS"]) and config["GROUPS"] >= configs.list_sizes(top_k)["PADDED_K"]
    assert config["ROWS"] == 1 and is_power_of_2(config["num_warps"])
    assert config["GROUPS"] <= 2**15  # two counts of a step share an int32


@given(top_ks, st.integers(1, 46_340), st.integers(1, 2048), token_hints, itemsizes)
def test_select_computed(top_k, n_keys, half_dim, tokens, itemsize):
    config = configs.computed_config(top_k, max(n_keys, top_k), half_dim, tokens, itemsize)
    sizes = (config["ROWS"], config["GROUPS"], config["DEPTH"])
    assert all(is_power_of_2(size) and size >= 16 for size in sizes)  # what `tl.dot` multiplies
    assert config["GROUPS"] >= configs.list_sizes(top_k)["PADDED_K"] and config["GROUPS"] <= 2**15
    assert config["ROWS"] * config["GROUPS"] >= 32 * config["num_warps"]  # a product for each thread


@given(value_dims, token_hints)
def test_gather(value_dim, tokens):
    offered = configs.gather_configs(tokens, value_dim)
    assert offered and all(offered.count(config) == 1 for config in offered)
    for config in offered:
        assert is_power_of_2(config["BLOCK_HITS"]) and is_power_of_2(config["BLOCK_COLUMNS"])
        assert config["BLOCK_COLUMNS"] <= max(8, configs.next_power_of_2(value_dim))
        assert -(-value_dim // config["BLOCK_COLUMNS"]) <= 65_535  # of a grid's second dimension
    fitting = [config for config in configs.GATHERING if config["BLOCK_COLUMNS"] <= configs.next_power_of_2(value_dim)]
    assert not fitting or (len(offered) == len(fitting) and all(config in fitting for config in offered))


@given(st.integers(64, 2**16), st.integers(1, 2**16))
def test_few_tokens_are_cut_into_many_programs(value_dim, tokens):
    """At least 256 where some configuration gives them; as many as any does otherwise."""

    def programs(config: configs.Config) -> int:
        return tokens * -(-value_dim // config["BLOCK_COLUMNS"])

    first, *rest = configs.gather_configs(tokens, value_dim)
    most = max(programs(config) for config in (first, *rest))
    assert programs(first) >= min(256, most)
    assert configs.gather_configs(2**16, 4096)[0] == configs.GATHERING[0]


@given(value_dims)
def test_gather_dot(value_dim):
    config = configs.dot_config(value_dim)
    assert is_power_of_2(config["BLOCK_HITS"]) and is_power_of_2(config["BLOCK_COLUMNS"])
    assert 8 <= config["BLOCK_COLUMNS"] <= 512


@given(value_dims, value_dims)
def test_pairs(dotted, summed):
    config = configs.pair_config(dotted, summed)
    assert all(is_power_of_2(config[name]) for name in ("BLOCK_HITS", "BLOCK_COLUMNS", "SUMMED", "num_warps"))
    # Of a program's sums and of a block of rows, so many a thread.
    threads = 32 * config["num_warps"]
    assert config["BLOCK_HITS"] * max(config["SUMMED"], config["BLOCK_COLUMNS"]) <= 32 * threads
    assert config["SUMMED"] >= min(summed, 2048) or config["SUMMED"] == 8
    assert -(-summed // config["SUMMED"]) <= 65_535


@given(value_dims, st.integers(0, 2**30))
def test_sums(value_dim, total):
    """A run repeats another bit for bit only if the blocks are the same: they come of shapes, and of nothing else."""
    config = configs.sum_config(value_dim, total)
    assert config == configs.sum_config(value_dim, total)
    assert is_power_of_2(config["CHUNK"]) and 16 <= config["CHUNK"] <= 256
    assert is_power_of_2(config["BLOCK_COLUMNS"]) and config["BLOCK_COLUMNS"] <= 256
    assert -(-value_dim // config["BLOCK_COLUMNS"]) <= 65_535
    # Partial sums, fp32 [2, chunks, value_dim], are at most 1/8 of what is read, or few.
    assert -(-max(total, 1) // config["CHUNK"]) <= max(4096, total / 16 + 1)


@given(st.integers(1, 2**20), st.integers(1, 30))
def test_chunks_do_not_depend_on_the_environment(value_dim, exponent):
    total = 2**exponent
    assert configs.sum_config(value_dim, total)["CHUNK"] == configs.sum_config(1, total)["CHUNK"]


@given(st.one_of(value_dims, st.just(0)), itemsizes.map(lambda size: 2 * size))
def test_rows_updated_in_place(value_dim, itemsize):
    for config in (
        configs.update_config(value_dim, itemsize),
        configs.update_config(value_dim, itemsize, whole_rows=True),
    ):
        assert (
            is_power_of_2(config["ROWS"])
            and is_power_of_2(config["BLOCK_COLUMNS"])
            and is_power_of_2(config["num_warps"])
        )
        assert config["num_warps"] <= 8
        assert config["BLOCK_COLUMNS"] <= max(16, configs.next_power_of_2(value_dim))
        assert -(-value_dim // config["BLOCK_COLUMNS"]) <= 65_535
    assert config["BLOCK_COLUMNS"] >= min(value_dim, 16_384 // itemsize)  # a row at once, whose mean square is asked
