"""The kernels that read and write rows of the table against the fp64 oracle, and a whole layer with its gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.lowering import memory_lookup
from memcompile.lowering.triton import configs
from tests.lowering.cases import VARIANTS, Recorder, gradients, leaves
from tests.lowering.gather.test_weighted_gather import (
    gather_dot,
    make,
    plain_dot,
    plain_gather,
    plain_scatter,
    weighted_gather,
    weighted_scatter,
)
from tests.lowering.reference import memory_lookup_reference
from tests.tolerance import assert_as_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

shapes = given(
    tokens=st.integers(0, 6),
    hits=st.integers(1, 20),
    value_dim=st.integers(1, 40),
    num_slots=st.sampled_from([1, 3, 50]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)


def inputs(tokens, hits, value_dim, num_slots, dtype, wide, seed):
    """Weights in fp32; slots in int64 and all at strides of their own, where `wide`."""
    index_dtype = torch.int64 if wide else torch.int32
    return make(tokens, hits, num_slots, value_dim, dtype, torch.float32, index_dtype, strided=wide, seed=seed)


@shapes
def test_weighted_gather(**sizes):
    values, slots, weights, _ = inputs(**sizes)
    plain, exact = plain_gather(values, slots, weights), plain_gather(values.double(), slots, weights)
    assert_as_accurate(weighted_gather(values, slots, weights), plain, exact)


@shapes
def test_gather_dot(**sizes):
    values, slots, _, grad = inputs(**sizes)
    plain, exact = (plain_dot(values.to(dtype), slots, grad.to(dtype)) for dtype in (torch.float32, torch.float64))
    assert_as_accurate(gather_dot(values, slots, grad), plain, exact)


@pytest.mark.parametrize("atomics", ["0", "1"])
def test_weighted_scatter(monkeypatch, atomics):
    """Chunks of 4 hits: slots within one, across two, across many."""
    monkeypatch.setenv("MEMCOMPILE_ATOMICS", atomics)
    monkeypatch.setattr(
        configs, "sum_config", lambda value_dim, total: {"CHUNK": 4, "BLOCK_COLUMNS": 16, "num_warps": 1}
    )

    @shapes
    def run(**sizes):
        _, slots, weights, grad = inputs(**sizes)
        num_slots = sizes["num_slots"]
        found = weighted_scatter(slots, weights, grad, num_slots)
        plain = plain_scatter(slots, weights, grad.float(), num_slots).to(grad.dtype)
        assert_as_accurate(found, plain, plain_scatter(slots, weights, grad.double(), num_slots))
        untouched = torch.ones(num_slots, dtype=torch.bool).index_fill_(0, slots.reshape(-1).long(), False)
        assert (found[untouched] == 0).all()

    run()


def test_a_slot_sums_its_hits_in_their_order():
    """The order of tokens decides no bit but through the sum's own order: equal runs are equal bit for bit."""
    slots = torch.randint(3, (20, 7), dtype=torch.int32)
    weights, grad = torch.randn(20, 7), torch.randn(20, 33)
    first = weighted_scatter(slots, weights, grad, 3)
    assert all(torch.equal(weighted_scatter(slots, weights, grad, 3), first) for _ in range(3))


def test_a_block_of_a_row_and_many_of_it():
    """Integers, whose sums are exact in any order."""
    for value_dim in (7, 64, 100, 513, 1100):
        values, slots, weights, grad = inputs(2, 9, value_dim, 11, torch.float32, False, 0)
        values, weights, grad = (4 * values).round(), (4 * weights).round(), (4 * grad).round()
        assert torch.equal(weighted_gather(values, slots, weights), plain_gather(values, slots, weights))
        assert torch.equal(gather_dot(values, slots, grad), plain_dot(values, slots, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "full"])
def test_a_layer_and_its_gradients(variant, dtype):
    """Three layers at once: the largest error of many numbers is a steady measure."""
    triples: dict[str, list] = {}
    for seed in range(3):
        case = replace(VARIANTS[variant], dtype=dtype, seed=seed, leading=(4,), half_dim=9, value_dim=21, heads=1)
        tensors = case.tensors()
        with Recorder() as seen:
            output = memory_lookup(*tensors, **case.options)
        plain_tensors, exact_tensors = leaves(tensors), leaves(tensors, torch.float64)
        plain = memory_lookup_reference(*plain_tensors, **case.options, slots=seen.slots)
        exact = memory_lookup_reference(*exact_tensors, **case.options, slots=seen.slots)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        triples.setdefault("output", []).append((output, plain, exact))
        found, expected, true = (
            gradients(*of, grad) for of in ((output, tensors), (plain, plain_tensors), (exact, exact_tensors))
        )
        for name in found:
            triples.setdefault(name, []).append((found[name], expected[name], true[name]))
    for name, layers in triples.items():
        assert_as_accurate(*(torch.stack(tensors) for tensors in zip(*layers, strict=True)), name=name)


def test_it_was_triton(launched):
    values = torch.randn(9, 5, requires_grad=True)
    weights = torch.randn(2, 3, requires_grad=True)
    weighted_gather(values, torch.randint(9, (2, 3)), weights).sum().backward()
    assert sorted(launched) == ["gather_dot_rows", "join_chunks", "sum_chunks", "weighted_gather_rows"]
