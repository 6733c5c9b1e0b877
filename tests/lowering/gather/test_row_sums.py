"""row_sums: the rows that weighted_scatter fills, bit for bit, and nothing of the table's size."""

import pytest
import torch
from hypothesis import given
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile.lowering import operator
from memcompile.lowering.gather.weighted_gather import _sums
from tests.lowering.gather.test_weighted_gather import DTYPES, inputs, largest_allocation, make, plain_scatter
from tests.tolerance import assert_as_accurate

row_sums, weighted_scatter = map(operator, ("row_sums", "weighted_scatter"))


@given(inputs)
def test_values(drawn):
    values, slots, weights, grad = drawn
    slot_count = len(values)
    rows, sums = row_sums(slots, weights, grad, slot_count)
    assert rows.dtype is torch.int64 and torch.equal(rows, slots.unique().long())
    assert sums.dtype is grad.dtype and torch.equal(sums, weighted_scatter(slots, weights, grad, slot_count)[rows])
    in_pytorch = _sums(slots, weights, grad, slot_count)
    assert torch.equal(in_pytorch[0], rows)
    exact = plain_scatter(slots, weights.double(), grad.double(), slot_count)[rows]
    plain = plain_scatter(slots, weights, grad, slot_count)[rows]
    for found in (sums, in_pytorch[1]):
        assert_as_accurate(found, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_all_hits_rows_nor_the_table(dtype):
    """At most the sums themselves, the size of 64 rows, and numbers of hits."""
    _, slots, weights, grad = make(tokens=512, hits=32, num_slots=64, value_dim=640, dtype=dtype)
    all_rows, table = 512 * 32 * 640 * dtype.itemsize, 10**9
    for call in (row_sums, _sums):
        assert largest_allocation(lambda call=call: call(slots, weights, grad, table)) <= all_rows / 10


def test_opcheck():
    _, slots, weights, grad = make(dtype=torch.float32)
    torch.library.opcheck(row_sums, (slots, weights, grad, 11))
    trained = weights.requires_grad_(), grad.requires_grad_()
    torch.library.opcheck(row_sums, (slots, *trained, 11))
    assert not row_sums(slots, *trained, 11)[1].requires_grad


def test_traced_with_a_size_that_is_not_known():
    _, slots, weights, grad = make(dtype=torch.float32)
    graph = make_fx(lambda *args: row_sums(*args, 11), tracing_mode="symbolic")(slots, weights, grad)
    assert all(map(torch.equal, graph(slots, weights, grad), row_sums(slots, weights, grad, 11)))


def test_errors():
    _, slots, weights, grad = make()
    for call, message in (
        (lambda: row_sums(slots[0], weights, grad, 11), r"slots.*\[tokens, hits\]"),
        (lambda: row_sums(slots, weights[:2], grad, 11), "weights"),
        (lambda: row_sums(slots, weights, grad[:2], 11), r"grad.*value_dim\]"),
        (lambda: row_sums(slots + 100, weights, grad, 11), "out of range"),
        (lambda: row_sums(slots - 100, weights, grad, 11), "out of range"),
        (lambda: row_sums(slots.float(), weights, grad, 11), "slots"),
    ):
        with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
            call()
