"""The reference against the layer's definition, one token, head and slot at a time; and the tolerance helper."""

import math

import pytest
import torch

from tests.lowering.cases import Case
from tests.lowering.reference import memory_lookup_reference, pair_gather_reference
from tests.tolerance import assert_as_accurate


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_reference_is_the_definition(qk_norm):
    case = Case(leading=(3,), qk_norm=qk_norm, dtype=torch.float64)
    tensors = case.tensors()
    x, w_q, b_q, keys, values, w_1, b_1, w_2, b_2, temperature = (None if t is None else t.detach() for t in tensors)
    expected = []
    for token in x:
        y = torch.zeros(case.value_dim, dtype=torch.float64)
        for head in range(case.heads):
            rows = slice(head * 2 * case.half_dim, (head + 1) * 2 * case.half_dim)
            query = w_q[rows] @ token + b_q[rows]
            sides = []
            for side in range(2):
                half = query[side * case.half_dim : (side + 1) * case.half_dim]
                side_keys = keys[side, head]
                if qk_norm:
                    half = half / half.norm()
                    side_keys = side_keys / side_keys.norm(dim=1, keepdim=True)
                sides.append(side_keys @ half * (temperature[head] if qk_norm else 1))
            sums = {
                i * case.n_keys + j: (sides[0][i] + sides[1][j]).item()
                for i in range(case.n_keys)
                for j in range(case.n_keys)
            }
            best = sorted(sums, key=sums.__getitem__, reverse=True)[: case.top_k]
            total = sum(math.exp(sums[slot]) for slot in best)
            for slot in best:
                y = y + math.exp(sums[slot]) / total * values[slot]
        gate = w_1 @ token + b_1
        expected.append(w_2 @ (y * gate * torch.sigmoid(gate)) + b_2)
    actual = memory_lookup_reference(*tensors, **case.options)
    torch.testing.assert_close(actual.detach(), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_pairs_are_experts_of_one_neuron():
    case = Case(leading=(3,), gate=False, out_dim=None, pairs=True, dtype=torch.float64)
    x, *rest = (None if t is None else t.detach() for t in case.tensors())
    values, slots = rest[3], torch.tensor([[3, 8], [0, 0], [48, 5]])
    weights = torch.tensor([[0.3, -2.0], [1.0, 0.5], [0.0, 1.5]], dtype=torch.float64)
    expected = torch.zeros(3, case.value_dim, dtype=torch.float64)
    for token in range(3):
        for hit in range(2):
            pair = values[slots[token, hit]].tolist()
            z = math.fsum(a * b for a, b in zip(pair[: case.width], x[token].tolist(), strict=True))
            gelu = z * (1 + math.erf(z / math.sqrt(2))) / 2
            expected[token] += weights[token, hit] * gelu * torch.tensor(pair[case.width :], dtype=torch.float64)
    torch.testing.assert_close(pair_gather_reference(values, slots, weights, x), expected, rtol=1e-12, atol=1e-12)
    layer = memory_lookup_reference(x, *rest, **case.options, slots=torch.zeros(3, 2, 1, dtype=torch.int64))
    ones = torch.ones(3, 2, dtype=torch.float64)  # the softmax of one slot a head
    assert torch.equal(layer, pair_gather_reference(values, torch.zeros(3, 2, dtype=torch.int64), ones, x))


def test_the_tolerance_accepts_its_own_precision_and_nothing_much_worse():
    exact = torch.tensor([1.0, 3.0], dtype=torch.float64)
    plain = exact.float()
    eps = torch.finfo(torch.float32).eps
    assert_as_accurate(plain + torch.tensor([5 * eps, 0]), plain, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(plain + torch.tensor([7 * eps, 0]), plain, exact)
    with pytest.raises(AssertionError, match="nan"):
        assert_as_accurate(torch.tensor([1.0, math.nan]), plain, exact)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_as_accurate(plain.bfloat16(), plain, exact)
