"""What the C++ kernels promise beyond the operators' own tests: exact, and one answer on any number of threads."""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.lowering import cpu, operator
from memcompile.lowering.search.product_key_topk import _kernel as topk_in_pytorch
from tests.lowering.cases import assert_best, scores_of, weights_at
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler: the operators run as PyTorch operators here")

gather, dot, scatter = (operator(name) for name in ("weighted_gather", "gather_dot", "weighted_scatter"))
pair_gather, pair_grads, pair_scatter = (operator(name) for name in ("pair_gather", "pair_grads", "pair_scatter"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(dtype, tokens=300, hits=24, num_slots=700, dim=83):
    generator = torch.Generator().manual_seed(0)
    slots = (torch.rand(tokens, hits, generator=generator) ** 3 * num_slots).int()  # a few slots have most of the hits
    weights = torch.randn(tokens, hits, generator=generator)
    return (
        torch.randn(num_slots, dim, generator=generator).to(dtype),
        slots,
        weights.double() if dtype is torch.float64 else weights,
        torch.randn(tokens, dim, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_for_bit_over_repeats_and_threads(dtype, threads):
    values, slots, weights, grad = inputs(dtype)
    query, half_keys = torch.randn(300, 2, 44).to(dtype), torch.randn(2, 2, 150, 22).to(dtype)
    scores = torch.randn(2, 300, 2, 150, dtype=torch.promote_types(dtype, torch.float32))
    x, out = grad[:, :40], grad[:, 40:]

    def run():
        y, dots = pair_gather(values, slots, weights, x)
        return (
            y,
            *pair_grads(values, slots, weights, x, dots, out),
            pair_scatter(slots, dots, x, weights, out, len(values)),
            gather(values, slots, weights),
            dot(values, slots, grad),
            scatter(slots, weights, grad, len(values)),
            scatter(slots.long(), weights, grad, len(values)),
            *operator("row_sums")(slots, weights, grad, len(values)),
            *operator("product_key_search")(query, half_keys, 19),
            *operator("product_key_topk")(scores, 19),
        )

    threads(1)
    first = run()
    for count in (1, 2, 2, 3):
        threads(count)
        assert all(map(torch.equal, run(), first))
    assert torch.equal(first[8], first[9])  # slots of both dtypes


@pytest.mark.parametrize("num_slots", [5_000, 5_000_000])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_many_hits_of_large_tables(num_slots, index_dtype, threads):
    """So many that the slots are sorted in several passes and by several threads."""
    generator = torch.Generator().manual_seed(0)
    slots = (torch.rand(700, 100, generator=generator) ** 4 * num_slots).to(index_dtype)
    weights, grad = torch.randn(700, 100, generator=generator), torch.randn(700, 3, generator=generator)
    rows = (weights.double().unsqueeze(-1) * grad.double().unsqueeze(1)).flatten(0, 1)  # [hits, 3]
    exact = torch.zeros(num_slots, 3, dtype=torch.float64).index_add_(0, slots.flatten().long(), rows)
    for count in (1, 2, 3):
        threads(count)
        found = scatter(slots, weights, grad, num_slots)
        torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-4)
        assert torch.equal(found == 0, exact == 0)
        rows, sums = operator("row_sums")(slots, weights, grad, num_slots)
        assert torch.equal(rows, slots.unique().long()) and torch.equal(found[rows], sums)


@pytest.mark.parametrize("half_dim", [1024, 2050])
@pytest.mark.parametrize("tokens", [2, 50])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_long_half_keys(half_dim, tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(tokens, 16, 2 * half_dim, generator=generator).to(dtype)
    half_keys = (torch.randn(2, 16, 60, half_dim, generator=generator) * half_dim**-0.5).to(dtype)
    weights, slots = operator("product_key_search")(query, half_keys, 9)
    plain, exact = scores_of(query, half_keys), scores_of(query.double(), half_keys.double())
    assert_best(slots, plain, 9)
    assert_as_accurate(weights, weights_at(plain, slots), weights_at(exact, slots))


def test_tensors_that_are_not_plain():
    """Whatever the C++ kernels do not take goes to PyTorch's operators, and their errors come from there."""
    values, slots, weights, _ = inputs(torch.float32)
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        gather(values.to_sparse(), slots, weights)


def test_a_slot_sums_its_hits_in_the_order_of_tokens():
    """So in which order a token names its slots changes nothing."""
    _, slots, weights, grad = inputs(torch.float32, tokens=50, hits=12, num_slots=1000)
    ranked, order = slots.sort(dim=1, stable=True)
    assert torch.equal(
        scatter(ranked, weights.gather(1, order), grad, 1000),
        scatter(slots, weights, grad, 1000),
    )


@given(
    n=st.sampled_from((1, 2, 63, 64, 65, 127, 300, 1000)),
    kind=st.sampled_from(("random", "few numbers", "all equal", "signed zeros", "NaN", "infinite", "sorted")),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    data=st.data(),
)
def test_the_search_is_exact(n, kind, dtype, data):
    """Against sorting, in PyTorch: ties by index, NaN first, -0.0 as 0.0, for any k."""
    k = data.draw(st.one_of(st.integers(1, n), st.sampled_from((1, min(n, 32), n)))) if n <= 65 else min(n, 32)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scores = torch.randn(2, 5, 2, n, generator=generator, dtype=dtype)
    if kind == "few numbers":
        scores = scores.round()
    elif kind == "all equal":
        scores = torch.full_like(scores, 0.25)
    elif kind == "signed zeros":
        scores = torch.where(scores > 0, 0.0, -0.0).to(dtype)
    elif kind == "NaN":
        scores[scores > 1] = torch.nan
        scores[scores < -1] = -torch.nan
    elif kind == "infinite":
        scores[scores > 1] = torch.inf
        scores[scores < -1] = -torch.inf  # where it meets +inf the sum is NaN, which counts as the largest
    elif kind == "sorted":
        scores = scores.sort(dim=-1).values
    logits, slots = operator("product_key_topk")(scores, k)
    expected_logits, expected_slots = topk_in_pytorch(scores, k)
    assert torch.equal(slots, expected_slots)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart_and_half_dtypes_at_their_edges(dtype):
    table = torch.tensor([0.0, -0.0, 1e-7, 6e-8, -3e-5, 65504.0, torch.inf, -torch.inf, torch.nan, 1.0, 2.0 / 3]).to(
        dtype
    )
    rows = table.repeat(6, 9)[:, 3:90]  # whole vectors and a tail, in rows that are apart in memory
    slots, one = torch.tensor([[5], [0]]), torch.ones(2, 1)
    torch.testing.assert_close(gather(rows, slots, one), rows[[5, 0]], rtol=0, atol=0, equal_nan=True)
    finite = rows.nan_to_num(nan=0.0, posinf=2.0, neginf=-2.0)
    dots = dot(finite, slots, torch.ones(2, 87, dtype=dtype))
    torch.testing.assert_close(dots, finite[[5, 0]].to(dots.dtype).sum(1, keepdim=True))
    assert dot(rows, slots, torch.ones(2, 87, dtype=dtype)).isnan().all()


def test_columns_apart():
    values, slots, weights, _ = inputs(torch.float32)
    apart = torch.stack([values, values], dim=-1)[..., 0]
    assert apart.stride(1) == 2
    assert torch.equal(gather(apart, slots, weights), gather(values, slots, weights))


@pytest.mark.parametrize("slot", [-1, 700, 2**31 - 1])
def test_a_slot_out_of_range(slot):
    values, slots, weights, grad = inputs(torch.float32)
    slots[7, 3] = slot
    for run in (
        lambda: gather(values, slots, weights),
        lambda: dot(values, slots, grad),
        lambda: scatter(slots, weights, grad, 700),
        lambda: pair_gather(values, slots, weights, grad[:, :40]),
        lambda: pair_grads(values, slots, weights, grad[:, :40], weights, grad[:, 40:]),
        lambda: pair_scatter(slots, weights, grad, weights, grad, 700),
    ):
        with pytest.raises(RuntimeError, match=f"slot {slot} is out of range for a table of 700 rows"):
            run()


def test_shapes_are_checked_where_python_is_not_asked():
    """In inference mode PyTorch calls the kernels at once."""
    values, slots, weights, grad = inputs(torch.float32)
    with torch.inference_mode():
        for run, message in (
            (lambda: gather(values, slots, weights[:, :3]), "slots and weights must be"),
            (lambda: gather(values, slots, weights.int()), "weights must be floating point"),
            (lambda: dot(values, slots, grad.double()), "grad must have the dtype of values"),
            (
                lambda: operator("product_key_search")(torch.zeros(1, 1, 6), torch.zeros(2, 1, 3, 3).double(), 1),
                "one floating dtype",
            ),
            (lambda: dot(values, slots, grad[:, :3]), "grad \\[tokens, value_dim\\]"),
            (lambda: scatter(slots, weights, grad[:3], 700), "grad must be"),
            (lambda: pair_gather(values, slots, weights[:, :3], grad), "slots and weights must be"),
            (lambda: pair_gather(values, slots, weights, grad.double()), "x must have the dtype of values"),
            (lambda: pair_gather(values[:, :9], slots, weights, grad), "x \\[tokens, d\\]"),
            (lambda: pair_grads(values, slots, weights, grad, weights.double(), grad[:, :0]), "dots must be"),
            (lambda: pair_grads(values, slots, weights, grad, weights, grad), "grad must be"),
            (lambda: pair_scatter(slots, weights, grad, weights, grad[:3], 700), "grad must be"),
            (lambda: pair_scatter(slots, weights, grad, weights, grad.double(), 700), "one dtype"),
            (lambda: operator("row_sums")(slots, weights, grad, 700, weights), "or neither"),
            (lambda: operator("product_key_topk")(torch.zeros(2, 1, 1, 3), 4), "top_k <= n_keys <= 46340, got 4 and 3"),
            (lambda: operator("product_key_search")(torch.zeros(1, 1, 4), torch.zeros(2, 1, 3, 3), 1), "key_dim / 2"),
        ):
            with pytest.raises(RuntimeError, match=message):
                run()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_more_than_2_to_the_31_elements(index_dtype):
    """A table of 2**33 bytes that is mapped and not filled: only the pages with the rows that are read take memory."""
    num_slots, dim = 2**22 + 3, 1024
    memory = mmap.mmap(-1, num_slots * dim * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = torch.frombuffer(memory, dtype=torch.float16).view(num_slots, dim)
    assert values.numel() > 2**32
    last, middle = num_slots - 1, 2**21 + 1  # beyond 2**32 and 2**31 elements
    values[last], values[middle] = 2.0, torch.arange(dim).half()
    slots, weights = torch.tensor([[last, middle, 5]], dtype=index_dtype), torch.tensor([[3.0, 0.5, 1.0]])
    expected = 6.0 + 0.5 * torch.arange(dim)
    torch.testing.assert_close(gather(values, slots, weights)[0].float(), expected, rtol=2**-11, atol=0)
    assert dot(values, slots, torch.ones(1, dim).half()).tolist() == [[2.0 * dim, dim * (dim - 1) / 2, 0.0]]
    y, dots = pair_gather(values, slots, weights, torch.ones(1, dim - 2).half())
    sums = 2.0 * (dim - 2), (dim - 2) * (dim - 3) / 2
    assert dots.tolist() == [[*sums, 0.0]]
    last_two = 6.0 * sums[0] + 0.5 * sums[1] * torch.tensor([dim - 2, dim - 1])
    assert y.tolist() == [[torch.inf, torch.inf]] and (last_two > 65504).all()  # of fp16
