"""row_sums and hits_by_row: the rows that weighted_scatter fills, bit for bit, and nothing of the table's size."""

import pytest
import torch
from hypothesis import given
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile.lowering import operator
from memcompile.lowering.gather import row_sums as module
from tests.lowering.gather.test_weighted_gather import DTYPES, inputs, largest_allocation, make, plain_scatter
from tests.tolerance import assert_as_accurate

row_sums, hits_by_row, weighted_scatter = map(operator, ("row_sums", "hits_by_row", "weighted_scatter"))


@given(inputs)
def test_values(drawn):
    values, slots, weights, grad = drawn
    slot_count = len(values)
    rows, sums = row_sums(slots, weights, grad, slot_count)
    assert rows.dtype is torch.int64 and torch.equal(rows, slots.unique().long())
    assert sums.dtype is grad.dtype and torch.equal(sums, weighted_scatter(slots, weights, grad, slot_count)[rows])
    in_pytorch = module._sums(slots, weights, grad, slot_count)
    assert torch.equal(in_pytorch[0], rows)
    exact = plain_scatter(slots, weights.double(), grad.double(), slot_count)[rows]
    plain = plain_scatter(slots, weights, grad, slot_count)[rows]
    for found in (sums, in_pytorch[1]):
        assert_as_accurate(found, plain, exact)


@given(inputs)
def test_hits(drawn):
    slots = drawn.slots
    rows, ends, hits = hits_by_row(slots, len(drawn.values))
    assert torch.equal(rows, slots.unique().long()) and ends[0] == 0 and ends[-1] == slots.numel()
    assert (ends.diff() > 0).all() and all(t.dtype is torch.int64 for t in (rows, ends, hits))
    assert torch.equal(slots.reshape(-1)[hits], rows.repeat_interleave(ends.diff()).to(slots.dtype))
    assert torch.equal(hits, slots.reshape(-1).argsort(stable=True))
    assert all(map(torch.equal, module._hits(slots, len(drawn.values)), (rows, ends, hits)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_all_hits_rows_nor_the_table(dtype):
    """At most the sums themselves, the size of 64 rows, and numbers of hits."""
    _, slots, weights, grad = make(tokens=512, hits=32, num_slots=64, value_dim=640, dtype=dtype)
    all_rows, table = 512 * 32 * 640 * dtype.itemsize, 10**9
    for call in (row_sums, module._sums):
        assert largest_allocation(lambda call=call: call(slots, weights, grad, table)) <= all_rows / 10


def test_opcheck():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    _, slots, weights, grad = make(dtype=torch.float32)
    torch.library.opcheck(row_sums, (slots, weights, grad, 11), test_utils=tests)
    torch.library.opcheck(hits_by_row, (slots, 11), test_utils=tests)


def test_traced_with_a_size_that_is_not_known():
    _, slots, weights, grad = make(dtype=torch.float32)
    graph = make_fx(lambda *args: row_sums(*args, 11), tracing_mode="symbolic")(slots, weights, grad)
    assert all(map(torch.equal, graph(slots, weights, grad), row_sums(slots, weights, grad, 11)))


def test_errors():
    _, slots, weights, grad = make()
    for call, message in (
        (lambda: row_sums(slots[0], weights, grad, 11), r"slots.*\[tokens, hits\]"),
        (lambda: row_sums(slots, weights[:2], grad, 11), "weights"),
        (lambda: row_sums(slots, weights, grad[:2], 11), r"grad.*\[tokens"),
        (lambda: hits_by_row(slots.float(), 11), "slots"),
        (lambda: hits_by_row(slots[0], 11), r"slots.*\[tokens, hits\]"),
        (lambda: row_sums(slots + 100, weights, grad, 11), "out of range"),
        (lambda: hits_by_row(slots - 100, 11), "out of range"),
    ):
        with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
            call()
