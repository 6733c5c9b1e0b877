"""The training that is asked about: what is an error, and how many rows it touches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.cost.job import Job
from memcompile.errors import OptionError

WRONG = [
    (
        {"slots": 1000},
        r"slots must be a perfect square, n_keys\*\*2; got 1,000, the nearest are 961 \(31\*\*2\) and 1,024",
    ),
    ({"slots": 46341**2}, r"slots must be at most 2,147,395,600 \(46340\*\*2, which fit an int32\)"),
    ({"slots": 0}, "slots must be at least 1, got 0"),
    ({"slots": 256}, "top_k=32 exceeds n_keys=16: lower top_k or raise slots"),
    ({"value_dim": 0}, "value_dim must be at least 1, got 0"),
    ({"gpus": -8}, "gpus must be at least 1, got -8"),
    ({"tokens": 0}, "tokens must be at least 1"),
    ({"layers": 0}, "layers must be at least 1"),
    ({"heads": 0}, "heads must be at least 1"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"key_dim": 7}, r"key_dim must be even \(two half-keys share it\), got 7"),
    ({"dtype": "fp8"}, "dtype must be one of bf16, fp32, got 'fp8'"),
    ({"optimizer": "lion"}, "optimizer must be one of adamw, lazy_adam, row_wise_adagrad, sgd, got 'lion'"),
    ({"by": "blocks"}, "by must be one of columns, rows, got 'blocks'"),
    ({"variant": "moe"}, r"variant must be one of memory\+, memory, pkm, peer, got 'moe'"),
    ({"tables": "none"}, "tables must be one of shared, separate, got 'none'"),
    (
        {"variant": "peer", "by": "columns"},
        r"variant='peer' has rows of two vectors, which columns would cut: shard by rows \(--by rows\)",
    ),
    ({"slots": 2**30, "tables": "separate"}, "has 3,221,225,472 slots in 3 layers: lower slots or layers"),
    ({"unique": 0.0}, "unique must be a share above 0 and at most 1, got 0"),
    ({"unique": 1.5}, "unique must be a share above 0 and at most 1, got 1.5"),
    ({"skew": 0.5}, "skew must be at least 1, the mean's, got 0.5"),
    ({"skew": float("nan")}, "skew must be at least 1"),
]


def job(**options):
    return Job(**{"slots": 2**20, "value_dim": 64, "gpus": 8} | options)


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda v: "" if isinstance(v, str) else str(v))
def test_wrong_options_are_errors_that_name_them(options, message):
    with pytest.raises(OptionError, match=message):
        job(**options)


def test_what_follows_from_the_options():
    asked = job(slots=2**26, value_dim=2048)
    assert (asked.n_keys, asked.hits, asked.element_bytes, asked.query_width) == (8192, 128, 2, 1024)
    assert job(dtype="fp32", key_dim=10).element_bytes == 4 and job(key_dim=10).query_width == 10
    assert job(value_dim=10).shard(4) == (2**20, 3) and job(value_dim=10).shard(4, 3) == (2**20, 1)
    assert job(by="rows").shard(4) == (2**18, 64)


def test_separate_tables_and_pairs():
    assert job(tables="separate").shard(4) == (3 * 2**20, 16)
    assert job(tables="separate", by="rows").shard(4) == (3 * 2**18, 64)
    one = job(layers=1)
    assert job(tables="separate").touched_rows(4) == pytest.approx(3 * one.touched_rows(4), abs=2)
    pairs = job(variant="peer")
    assert (pairs.by, job().by) == ("rows", "columns")
    assert pairs.shard(4) == (2**18, 128) and pairs.output_columns(128) == 64


def test_rows_of_uniform_hits_are_those_of_a_draw():
    asked = job(slots=64**2, tokens=50, layers=2, heads=2, top_k=8)
    torch.manual_seed(0)
    draws = torch.randint(asked.slots, (200, 4 * 50 * 2 * 16))
    distinct = sum(len(draw.unique()) for draw in draws) / len(draws)
    assert asked.touched_rows(4) == pytest.approx(distinct, rel=1e-2)


@given(ranks=st.integers(1, 512), unique=st.floats(0.01, 1))
def test_rows_are_at_most_the_slots_and_the_hits(ranks, unique):
    asked = job(tokens=3, unique=unique)
    assert 1 <= asked.touched_rows(ranks) <= min(asked.slots, ranks * 3 * 128 * 3)
    assert asked.touched_rows(ranks) <= asked.touched_rows(ranks + 1)
    assert asked.touched_rows(ranks) == pytest.approx(unique * job(tokens=3).touched_rows(ranks), abs=1)
