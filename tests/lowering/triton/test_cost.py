"""The choice between scores that are stored and scores that are computed on the way: counts by hand, and properties."""

import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.lowering.triton import cost
from memcompile.lowering.triton.configs import computed_config
from memcompile.lowering.triton.cost import H200, Device, Search, seconds_computed, seconds_stored

ADDED = 3e-6  # seconds: of a launch, which does not grow

searches = st.builds(
    Search,
    tokens=st.integers(1, 2**20),
    heads=st.integers(1, 16),
    n_keys=st.integers(1, 46_340),
    half_dim=st.integers(1, 512),
    itemsize=st.sampled_from([2, 4]),
)
devices = st.builds(
    Device,
    bandwidth=st.floats(1e11, 2e13),
    library_flops=st.floats(1e13, 5e15),
    half_flops=st.floats(1e13, 5e15),
    fp32_flops=st.floats(1e12, 2e14),
    operations=st.floats(1e12, 2e14),
    multiprocessors=st.integers(1, 256),
    cache=st.floats(1e6, 2e8),
)


@given(searches)
def test_counts_by_hand(search):
    halves, scores = 2, 0
    for _ in range(halves):
        scores += search.tokens * search.heads * search.n_keys
    assert search.scores == scores
    assert search.stored_bytes == 4 * scores  # fp32
    assert search.gemm_flops == scores * search.half_dim * 2  # a product and a sum each
    queries = search.tokens * search.heads * halves * search.half_dim
    keys = halves * search.heads * search.n_keys * search.half_dim
    assert search.operand_bytes == (queries + keys) * search.itemsize


def test_a_search_by_hand():
    search = Search(tokens=512, heads=4, n_keys=1024, half_dim=64, itemsize=2)
    assert search.scores == 4_194_304
    assert search.stored_bytes == 16_777_216
    assert search.gemm_flops == 536_870_912
    assert search.operand_bytes == 524_288 + 1_048_576


@given(searches, devices, st.integers(1, 2**20))
def test_more_tokens_never_cost_less_stored(search, device, more):
    """But for the cache: what no longer fits it costs more, never less."""
    larger = replace(search, tokens=search.tokens + more)
    assert seconds_stored(larger, device) >= seconds_stored(search, device) > 0


@given(searches, devices, st.integers(1, 2**20), st.sampled_from([16, 32, 64]))
def test_more_tokens_never_cost_less_computed(search, device, more, rows):
    larger = replace(search, tokens=search.tokens + more)
    few, many = (seconds_computed(found, device, rows) for found in (search, larger))
    assert many >= few * (1 - 1e-9) > 0


@given(searches, devices)
def test_longer_half_keys_and_more_of_them_never_cost_less(search, device):
    for larger in (replace(search, half_dim=2 * search.half_dim), replace(search, n_keys=2 * search.n_keys)):
        assert seconds_stored(larger, device) >= seconds_stored(search, device)
        assert seconds_computed(larger, device, 16) >= seconds_computed(search, device, 16)


@given(searches, devices, st.integers(1, 64))
def test_the_cheaper_form_is_chosen(search, device, top_k):
    config = computed_config(top_k, search.n_keys, search.half_dim, search.tokens, search.itemsize)
    stored = cost.stores_scores(search, top_k, device)
    if search.stored_bytes > 2**31:
        assert not stored
    else:
        assert stored == (seconds_stored(search, device) <= seconds_computed(search, device, config["ROWS"]))


@given(searches, devices)
def test_scores_of_more_than_2_gib_are_not_stored(search, device):
    """Whatever it costs; what is stored fits."""
    tokens = 2**31 // (4 * 2 * search.heads * search.n_keys) + 1
    assert not cost.stores_scores(replace(search, tokens=max(tokens, search.tokens)), 32, device)


@given(searches, devices)
def test_a_number_of_tokens_that_is_not_known_is_stored(search, device):
    assert cost.stores_scores(replace(search, tokens=0), 32, device)


def test_both_forms_are_chosen():
    chosen = {
        (tokens, half_dim, itemsize): cost.stores_scores(Search(tokens, 4, 1024, half_dim, itemsize), 32, H200)
        for tokens in (1, 16, 128, 512, 4096, 16_384)
        for half_dim in (16, 64, 256)
        for itemsize in (2, 4)
    }
    assert {*chosen.values()} == {True, False}
    assert chosen[4096, 256, 2] and not chosen[16_384, 16, 2]  # a long product is worth storing, a short one is not
    assert chosen[1, 64, 2] and chosen[4096, 256, 4]  # one token leaves most multiprocessors idle


# --- devices --------------------------------------------------------------------------------------

PROPERTIES = {  # of what torch reports: multiprocessors, kHz, memory kHz, bits, bytes of L2
    "A100": (8, 108, 1_410_000, 1_593_000, 5_120, 41_943_040),
    "H100": (9, 132, 1_980_000, 2_619_000, 5_120, 52_428_800),
    "B200": (10, 148, 1_965_000, 3_996_000, 8_192, 132_644_864),
}
# TB/s, TFLOP/s dense of bf16 and of fp32, as the data sheets have them.
SHEETS = {"A100": (2.0, 312, 19.5), "H100": (3.35, 989, 67), "B200": (8.0, 2250, 75)}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of these properties, as torch reports them."""

    def become(**properties: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**properties))

    return become


def properties_of(name: str) -> dict[str, float]:
    major, multiprocessors, clock, memory_clock, width, cache = PROPERTIES[name]
    return {
        "major": major,
        "minor": 0,
        "multi_processor_count": multiprocessors,
        "clock_rate": clock,
        "memory_clock_rate": memory_clock,
        "memory_bus_width": width,
        "L2_cache_size": cache,
    }


def rates() -> Device:
    return cost.device_rates.__wrapped__(torch.device("cuda:0"))


@pytest.mark.parametrize("name", PROPERTIES)
def test_rates_of_a_device(gpu, name):
    gpu(**properties_of(name))
    bandwidth, half, _ = SHEETS[name]
    assert 0.75 * bandwidth <= rates().bandwidth / 1e12 <= bandwidth
    assert 0.6 * half <= rates().half_flops / 1e12 <= half
    assert rates().library_flops == rates().half_flops
    assert (rates().multiprocessors, rates().cache) == (PROPERTIES[name][1], PROPERTIES[name][-1])


@pytest.mark.parametrize("name", ["A100", "H100", "B200"])
def test_rates_of_its_lanes(gpu, name):
    gpu(**properties_of(name))
    full = SHEETS[name][2]
    assert 0.6 * full <= rates().fp32_flops / 1e12 <= 1.05 * full
    assert rates().operations <= 1.05 * full / 2 * 1e12


@pytest.mark.parametrize("missing", ["clock_rate", "memory_clock_rate", "memory_bus_width", "L2_cache_size"])
def test_a_device_that_does_not_tell_its_rates(gpu, missing):
    """Attributes come and go with versions of torch, and drivers report zeros."""
    known = properties_of("A100")
    gpu(**{name: value for name, value in known.items() if name != missing})
    assert rates() == H200
    gpu(**known | {missing: 0})
    assert rates() == H200


def test_rates_without_a_gpu():
    assert cost.device_rates(torch.device("cpu")) == cost.device_rates(torch.device("meta")) == H200


def test_amd_multiplies_half_dtypes_itself(gpu, monkeypatch):
    """ROCm's library has no GEMM of half dtypes with fp32 results: it multiplies in fp32, `tl.dot` does not."""
    gpu(**properties_of("H100"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert rates() == cost.MI300X
    assert rates().library_flops < rates().half_flops
