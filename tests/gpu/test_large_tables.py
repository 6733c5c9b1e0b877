"""Tables of more than 2**31 numbers: rows beyond are read and written as those before."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.gpu.exact import assert_zero_elsewhere, rows_of
from tests.gpu.how import HOW, how
from tests.lowering.gather.test_weighted_gather import plain_dot, plain_gather, plain_scatter
from tests.tolerance import assert_as_accurate

gather = torch.ops.memcompile.weighted_gather.default
dot = torch.ops.memcompile.gather_dot.default
scatter = torch.ops.memcompile.weighted_scatter.default

TOKENS, HITS, DTYPE = 256, 128, torch.bfloat16
INDEX = pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)


class Data(NamedTuple):
    slots: Tensor  # [tokens, hits], half of them beyond
    weights: Tensor  # [tokens, hits], fp32
    grad: Tensor  # [tokens, value_dim]
    hit: Tensor  # [rows], the slots that are hit
    position: Tensor  # [tokens, hits], where in `hit`


@pytest.fixture
def data(device, sizes, needs_memory):
    table_bytes = sizes.large_rows * sizes.large_width * DTYPE.itemsize
    needs_memory(2 * table_bytes + 4e9)
    first = sizes.large_elements // sizes.large_width
    assert first < sizes.large_rows
    before = torch.randint(first, (TOKENS, HITS // 2), device=device)
    beyond = torch.randint(first, sizes.large_rows, (TOKENS, HITS // 2), device=device)
    slots = torch.cat([before, beyond], dim=1)[:, torch.randperm(HITS, device=device)]
    slots[0, :3] = torch.tensor([0, first, sizes.large_rows - 1], device=device)
    hit, position = slots.unique(return_inverse=True)
    weights = torch.randn(TOKENS, HITS, device=device)
    return Data(slots, weights, torch.randn(TOKENS, sizes.large_width, device=device).to(DTYPE), hit, position)


@pytest.fixture
def table(device, sizes, data):
    return torch.randn(sizes.large_rows, sizes.large_width, device=device, dtype=DTYPE)


@INDEX
@HOW
def test_weighted_gather(index, compiled, data, table):
    rows = rows_of(table, data.hit)
    actual = how(lambda v, s, w: gather(v, s, w), compiled, dynamic=False)(table, data.slots.to(index), data.weights)
    plain = plain_gather(rows, data.position, data.weights)
    assert_as_accurate(actual, plain, plain_gather(rows.double(), data.position, data.weights.double()))


@INDEX
@HOW
def test_gather_dot(index, compiled, data, table):
    rows = rows_of(table, data.hit)
    actual = how(lambda v, s, u: dot(v, s, u), compiled, dynamic=False)(table, data.slots.to(index), data.grad)
    plain = plain_dot(rows.float(), data.position, data.grad.float())
    assert_as_accurate(actual, plain, plain_dot(rows.double(), data.position, data.grad.double()))


@INDEX
@HOW
def test_weighted_scatter(index, compiled, data, sizes):
    num_slots = sizes.large_rows
    run = how(lambda s, w, u: scatter(s, w, u, num_slots), compiled, dynamic=False)
    actual = run(data.slots.to(index), data.weights, data.grad)
    assert actual.shape == (num_slots, sizes.large_width)
    assert_zero_elsewhere(actual, data.hit)
    right = data.position, data.weights.double(), data.grad.double(), len(data.hit)
    plain = plain_scatter(data.position, data.weights, data.grad, len(data.hit))
    assert_as_accurate(rows_of(actual, data.hit), plain, plain_scatter(*right))
