"""Bytes on the wire against an enumeration of who sends what to whom, element by element, and rings that really sum."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.cost.job import Job
from memcompile.cost.wire import layer_collectives, step_collectives

RANKS = (1, 2, 3, 4, 7)
TOKENS, HEADS, TOP_K = 5, 2, 3
HITS = HEADS * TOP_K
DIMS = (1, 2, 5, 8, 12, 13)  # also fewer columns than ranks, and chunks that leave the last ranks less or nothing


def job(value_dim, **options):
    sizes = {"slots": 64, "gpus": 1, "tokens": TOKENS, "heads": HEADS, "top_k": TOP_K, "layers": 1}
    return Job(value_dim=value_dim, **sizes | options)


def test_pairs_send_tokens_and_their_gradients_too():
    plain, pairs = (layer_collectives(job(8, by="rows", variant=name), 4) for name in ("memory", "peer"))
    more = [collective for collective in pairs if collective not in plain]
    assert [c for c in pairs if c in plain] == list(plain)
    assert {c.name: (c.operation, c.received_bytes) for c in more} == {
        "tokens": ("all_gather", 3 * TOKENS * 8 * 2),
        "token gradients": ("reduce_scatter", 3 * TOKENS * 8 * 2),
    }


def columns_of(value_dim, ranks):
    """Of each rank, as DTensor's Shard(1) divides them."""
    chunks = [chunk.tolist() for chunk in torch.arange(value_dim).chunk(ranks)]
    return chunks + [[]] * (ranks - len(chunks))


def ring_reduce_scatter(ranks, chunk_bytes):
    """Bytes that each rank gets in a ring's reduce-scatter of `ranks` chunks, whose sums are checked."""
    parts = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # whose numbers are in a chunk
    received = Counter()
    for turn in range(ranks - 1):
        sent = [(rank, (rank - turn) % ranks, parts[rank][(rank - turn) % ranks]) for rank in range(ranks)]
        for rank, chunk, numbers in sent:
            after = (rank + 1) % ranks
            assert not parts[after][chunk] & numbers
            parts[after][chunk] = parts[after][chunk] | numbers
            received[after] += chunk_bytes
    assert all(parts[rank][(rank + 1) % ranks] == set(range(ranks)) for rank in range(ranks))
    return received


def gather(ranks, bytes_of_a_rank):
    """Bytes that each rank gets where all send the same to everyone."""
    received = Counter()
    for source in range(ranks):
        for rank in range(ranks):
            if rank != source:
                received[rank] += bytes_of_a_rank
    return received


def outputs_to_owners(value_dim, ranks, element_bytes):
    """Holders of columns send each token's part of the output to the rank that the token came from."""
    received = Counter()
    for holder, columns in enumerate(columns_of(value_dim, ranks)):
        for owner in range(ranks):
            for _ in range(TOKENS):
                for _ in columns:
                    received[owner] += element_bytes if owner != holder else 0
    return received


def gradients_to_holders(value_dim, ranks, element_bytes):
    received = Counter()
    for owner in range(ranks):
        for holder, columns in enumerate(columns_of(value_dim, ranks)):
            for _ in range(TOKENS):
                for _ in columns:
                    received[holder] += element_bytes if owner != holder else 0
    return received


def list_of_hits(ranks):
    slot_and_weight = torch.int32.itemsize + torch.float32.itemsize
    return gather(ranks, sum(slot_and_weight for _ in range(TOKENS) for _ in range(HITS)))


cases = pytest.mark.parametrize("ranks", RANKS)
dims = pytest.mark.parametrize("value_dim", DIMS)
dtypes = pytest.mark.parametrize(("dtype", "element_bytes"), [("bf16", 2), ("fp32", 4)])


@cases
@dims
def test_shards_are_those_of_torch_chunk(value_dim, ranks):
    assert [job(value_dim).shard(ranks, r)[1] for r in range(ranks)] == [len(c) for c in columns_of(value_dim, ranks)]


@cases
@dims
@dtypes
def test_columns_against_an_enumeration(value_dim, ranks, dtype, element_bytes):
    sent = list_of_hits(ranks), outputs_to_owners(value_dim, ranks, element_bytes)
    sent_back = (
        gradients_to_holders(value_dim, ranks, element_bytes),
        ring_reduce_scatter(ranks, TOKENS * HITS * torch.float32.itemsize),
    )
    for rank in range(ranks):
        found = layer_collectives(job(value_dim, dtype=dtype, by="columns"), ranks, rank)
        if ranks == 1:
            assert found == ()
            continue
        forward, backward = found[:2], found[2:]
        assert [c.operation for c in forward] == ["all_gather", "all_to_all"]
        assert [c.received_bytes for c in forward] == [received[rank] for received in sent]
        assert [c.operation for c in backward] == ["all_to_all", "reduce_scatter"]
        assert [c.received_bytes for c in backward] == [received[rank] for received in sent_back]


@cases
@dims
@dtypes
def test_rows_against_an_enumeration(value_dim, ranks, dtype, element_bytes):
    outputs = TOKENS * value_dim * element_bytes  # of a rank's tokens
    sent = list_of_hits(ranks), ring_reduce_scatter(ranks, outputs)
    sent_back = gather(ranks, outputs), ring_reduce_scatter(ranks, TOKENS * HITS * torch.float32.itemsize)
    for rank in range(ranks):
        found = layer_collectives(job(value_dim, dtype=dtype, by="rows"), ranks, rank)
        if ranks == 1:
            assert found == ()
            continue
        forward, backward = found[:2], found[2:]
        assert [c.operation for c in forward] == ["all_gather", "reduce_scatter"]
        assert [c.received_bytes for c in forward] == [received[rank] for received in sent]
        assert [c.operation for c in backward] == ["all_gather", "reduce_scatter"]
        assert [c.received_bytes for c in backward] == [received[rank] for received in sent_back]


def step(value_dim, ranks, rank, replicas=1, **options):
    """The collectives, and how many rows a group of ranks and all of them touch."""
    asked = job(value_dim, gpus=ranks * replicas, **options)
    return step_collectives(asked, ranks, rank), asked.touched_rows(ranks), asked.touched_rows(asked.gpus)


@cases
@dims
@pytest.mark.parametrize("replicas", RANKS)
def test_a_sparse_gradient_against_an_enumeration(value_dim, ranks, replicas):
    for rank, columns in enumerate(columns_of(value_dim, ranks)):
        row = torch.int64.itemsize + sum(torch.float32.itemsize for _ in columns)
        found, rows, _ = step(value_dim, ranks, rank, replicas)
        expected = [] if replicas == 1 else [gather(replicas, sum(row for _ in range(rows)))[0]]
        assert [c.received_bytes for c in found] == expected
        assert all((c.operation, c.over) == ("all_gather", "replicas") for c in found)


@cases
@pytest.mark.parametrize("replicas", RANKS)
def test_a_dense_gradient_against_a_ring(ranks, replicas):
    slots, value_dim = 84**2, 13  # 84 is divided by every number of replicas
    for rank, columns in enumerate(columns_of(value_dim, ranks)):
        chunk = slots // replicas * len(columns) * 2
        expected = ring_reduce_scatter(replicas, chunk)[0] + gather(replicas, chunk)[0]
        found, *_ = step(value_dim, ranks, rank, replicas, slots=slots, values_grad="dense")
        assert [c.received_bytes for c in found] == ([expected] if replicas > 1 else [])


@cases
def test_by_rows_a_rank_has_a_part_of_the_rows_and_all_of_their_columns(ranks):
    value_dim, replicas = 5, 3
    row = 8 + value_dim * 4
    (sparse,), rows, _ = step(value_dim, ranks, 0, replicas, by="rows")
    assert sparse.received_bytes == (replicas - 1) * -(-rows // ranks) * row
    (dense,), *_ = step(value_dim, ranks, 0, replicas, by="rows", slots=84**2, values_grad="dense")
    assert dense.received_bytes == 2 * (replicas - 1) * (84**2 // ranks // replicas) * value_dim * 2


@cases
def test_row_wise_adagrad_sums_the_squares_of_rows_over_the_group(ranks):
    found, _, rows = step(13, ranks, 0, optimizer="row_wise_adagrad", slots=84**2, tokens=10**6)
    assert rows == 84**2  # all of them, which every number of ranks divides
    chunk = rows // ranks * torch.float32.itemsize
    expected = ring_reduce_scatter(ranks, chunk)[0] + gather(ranks, chunk)[0]
    assert [(c.received_bytes, c.operation, c.over) for c in found] == (
        [(expected, "all_reduce", "memory")] if ranks > 1 else []
    )
    by_rows, *_ = step(13, ranks, 0, optimizer="row_wise_adagrad", by="rows")
    assert by_rows == ()  # whole rows: nothing to sum


def test_row_wise_adagrad_sums_the_rows_of_all_replicas():
    (gradient, squares), rows, updated = step(8, 4, 0, 2, optimizer="row_wise_adagrad")
    assert rows < updated < 64
    assert gradient.received_bytes == rows * (8 + 2 * 4)
    assert squares.received_bytes == 2 * 3 * updated * 4 // 4
    (*_, squares), *_ = step(8, 4, 0, 2, optimizer="row_wise_adagrad", values_grad="dense")
    assert squares.received_bytes == 2 * 3 * 64 * 4 // 4  # all slots


@given(ranks=st.integers(1, 9), replicas=st.integers(2, 9))
def test_fractions_are_rounded_up(ranks, replicas):
    (dense,), *_ = step(5, ranks, 0, replicas, slots=49, values_grad="dense")
    exact = Fraction(2 * (replicas - 1), replicas) * 49 * -(-5 // ranks) * 2
    assert exact <= dense.received_bytes < exact + 1


@given(
    tokens=st.integers(1, 100),
    heads=st.integers(1, 100),
    value_dim=st.integers(1, 300),
    ranks=st.integers(2, 40),
    dtype=st.sampled_from(["bf16", "fp32"]),
)
def test_what_all_ranks_receive_by_columns_is_the_same_forward_and_backward(tokens, heads, value_dim, ranks, dtype):
    asked = job(value_dim, tokens=tokens, heads=heads, dtype=dtype)
    everyone = [[c.received_bytes for c in layer_collectives(asked, ranks, rank)] for rank in range(ranks)]
    hits, outputs, output_gradients, weight_gradients = map(sum, zip(*everyone, strict=True))
    everything = ranks * (ranks - 1) * tokens * asked.hits
    assert hits == everything * 8 and weight_gradients == everything * 4
    assert outputs == output_gradients
