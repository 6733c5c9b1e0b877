"""Gradients: each row once, in a sum that the order of duplicates does not change; what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memcompile.errors import OptionError
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad
from memcompile.runtime.table.touched_rows import touched_rows
from tests.runtime.optim.sequences import Sequence, train
from tests.tolerance import assert_as_accurate, largest_error

MAKERS = {
    "RowAdamW": lambda p: RowAdamW([p], weight_decay=0.1),
    "LazyAdam": lambda p: LazyAdam([p]),
    "RowwiseAdagrad": lambda p: RowwiseAdagrad([p]),
    "RowSGD": lambda p: RowSGD([p], weight_decay=0.1),
}


def duplicates(seed, count=60, rows=7, dim=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, dim, generator=generator) * 10 ** (3 * torch.rand(count, 1, generator=generator))
    return torch.randint(0, rows, (count,), generator=generator), values.to(dtype)


def coo(rows, values, slots=9):
    return torch.sparse_coo_tensor(rows[None], values, (slots, values.shape[1]), check_invariants=False)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_order_of_duplicates_does_not_matter(seed, dtype):
    rows, values = duplicates(seed, dtype=dtype)
    sums = torch.promote_types(dtype, torch.float32)
    expected_rows, expected = touched_rows(coo(rows, values), sums)
    order = torch.randperm(len(rows))
    actual_rows, actual = touched_rows(coo(rows[order], values[order]), sums)
    assert torch.equal(actual_rows, expected_rows) and torch.equal(actual, expected)
    exact = torch.zeros(9, 5, dtype=torch.float64).index_add_(0, rows, values.double())[expected_rows]
    plain = torch.zeros(9, 5, dtype=sums).index_add_(0, rows, values.to(sums))[expected_rows]
    assert_as_accurate(actual, plain, exact)


@pytest.mark.parametrize("name", MAKERS)
def test_bit_identical_repeats(name):
    sequence = Sequence(1, 150, 30, 19, "warm-up and cosine", 0.1)
    first, second = (train(sequence, MAKERS[name], torch.float32)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", MAKERS)
def test_coalesced_uncoalesced_and_dense_agree(name):
    results = []
    for form in (lambda g: g, lambda g: g.coalesce(), lambda g: g.to_dense()):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(9, 5, dtype=torch.float64))
        optimizer = MAKERS[name](parameter)
        for step in range(20):
            rows, values = duplicates(step, dtype=torch.float64, rows=9)
            rows[:9] = torch.arange(9)  # all rows, since LazyAdam tells touched from untouched
            parameter.grad = form(coo(rows, values))
            optimizer.step()
        results.append(parameter.detach())
    assert largest_error(results[1], results[0]) <= 1e-12 and largest_error(results[2], results[0]) <= 1e-12


@pytest.mark.parametrize("name", MAKERS)
def test_empty_gradients_and_none(name):
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = MAKERS[name](parameter)
    optimizer.step()
    assert not optimizer.state
    parameter.grad = coo(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3), slots=4)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1 and torch.equal(parameter, torch.ones(4, 3))
    optimizer.zero_grad()
    assert parameter.grad is None
    parameter.grad = torch.ones(4, 3).to_sparse(1)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 2 and parameter.grad.layout is torch.sparse_coo


def test_real_embeddings():
    """A sparse nn.Embedding and a dense one, trained on the same words."""
    torch.manual_seed(0)
    sparse, dense = nn.Embedding(50, 8, sparse=True).double(), nn.Embedding(50, 8).double()
    dense.load_state_dict(sparse.state_dict())
    ours, theirs = RowAdamW(sparse.parameters()), torch.optim.AdamW(dense.parameters())
    for _ in range(40):
        words = torch.randint(0, 50, (2, 6))
        ours.flush(sparse.weight, words)
        for table, optimizer in ((sparse, ours), (dense, theirs)):
            optimizer.zero_grad()
            table(words).square().sum().backward()
            optimizer.step()
    ours.flush(sparse.weight)
    assert largest_error(sparse.weight, dense.weight) <= 1e-12


def test_refusals():
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = RowAdamW([parameter])
    parameter.grad = torch.eye(4).to_sparse()
    with pytest.raises(ValueError, match="2 sparse dimensions"):
        optimizer.step()
    with pytest.raises(ValueError, match="expected dense, or sparse COO"):
        touched_rows(torch.eye(4).to_sparse_csr(), torch.float32)
    for wrong in (torch.zeros(3, 2, dtype=torch.float16), torch.zeros(2, 3).t(), torch.zeros(())):
        with pytest.raises(OptionError, match="params"):
            RowAdamW([nn.Parameter(wrong)])
