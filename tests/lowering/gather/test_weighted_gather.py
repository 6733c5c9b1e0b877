"""weighted_gather, gather_dot and weighted_scatter against einsum in float64, and as each other's gradients."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memcompile.lowering.gather import weighted_gather as module
from tests.tolerance import assert_as_accurate

weighted_gather = torch.ops.memcompile.weighted_gather.default
gather_dot = torch.ops.memcompile.gather_dot.default
weighted_scatter = torch.ops.memcompile.weighted_scatter.default

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    values: Tensor  # [num_slots, value_dim]
    slots: Tensor  # [tokens, hits]
    weights: Tensor  # [tokens, hits]
    grad: Tensor  # [tokens, value_dim]


def drawn_slots(
    generator: torch.Generator, tokens: int, hits: int, num_slots: int, dtype: torch.dtype, strided: bool
) -> Tensor:
    """[tokens, hits]."""
    slots = torch.randint(0, num_slots, (hits, tokens), generator=generator).to(dtype).T
    return slots if strided else slots.contiguous()


def drawn_rows(generator: torch.Generator, strided: bool) -> Callable[[int, int, torch.dtype], Tensor]:
    """What draws a matrix of so many rows and columns."""

    def rand(rows: int, columns: int, to: torch.dtype) -> Tensor:
        if strided:
            return torch.randn(columns, 2 * rows, generator=generator).to(to)[:, ::2].T
        return torch.randn(rows, columns, generator=generator).to(to)

    return rand


def make(
    tokens=5,
    hits=4,
    num_slots=11,
    value_dim=6,
    dtype=torch.float64,
    weights_dtype=None,
    index_dtype=torch.int32,
    strided=False,
    seed=0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    slots, rand = drawn_slots(generator, tokens, hits, num_slots, index_dtype, strided), drawn_rows(generator, strided)
    return Inputs(
        rand(num_slots, value_dim, dtype),
        slots,
        rand(tokens, hits, weights_dtype or dtype),
        rand(tokens, value_dim, dtype),
    )


def plain_gather(values, slots, weights):
    return torch.einsum("th,thd->td", weights.to(values.dtype), values[slots.long()])


def plain_dot(values, slots, grad):
    return torch.einsum("thd,td->th", values[slots.long()], grad)


def plain_scatter(slots, weights, grad, num_slots):
    rows = weights.to(grad.dtype).unsqueeze(-1) * grad.unsqueeze(1)  # [tokens, hits, value_dim]
    out = grad.new_zeros(num_slots, grad.shape[1])
    return out.index_add(0, slots.reshape(-1).long(), rows.flatten(0, 1))


def dot_dtype(dtype):
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


inputs = st.builds(
    make,
    tokens=st.integers(0, 9),
    hits=st.integers(1, 9),
    num_slots=st.integers(1, 13),
    value_dim=st.integers(1, 19),
    dtype=st.sampled_from(DTYPES),
    weights_dtype=st.sampled_from([None, torch.float32]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(inputs)
def test_values(drawn):
    values, slots, weights, grad = drawn
    rows = values.shape[0]
    exact = Inputs(values.double(), slots, weights.double(), grad.double())
    assert_as_accurate(
        weighted_gather(values, slots, weights),
        plain_gather(values, slots, weights),
        plain_gather(*exact[:3]),
        "weighted_gather",
    )
    assert_as_accurate(
        gather_dot(values, slots, grad),
        plain_dot(values.to(dot_dtype(values.dtype)), slots, grad.to(dot_dtype(values.dtype))),
        plain_dot(exact.values, slots, exact.grad),
        "gather_dot",
    )
    assert_as_accurate(
        weighted_scatter(slots, weights, grad, rows),
        plain_scatter(slots, weights, grad, rows),
        plain_scatter(slots, exact.weights, exact.grad, rows),
        "weighted_scatter",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_many_hits_are_kept_wide(dtype):
    """All hits on one slot: a sum kept in bf16 would stop growing at 256."""
    tokens = 3000
    slots = torch.zeros(tokens, 1, dtype=torch.int32)
    grad, ones = torch.ones(tokens, 2, dtype=dtype), torch.ones(tokens, 1)
    scattered = weighted_scatter(slots, ones, grad, 1)
    gathered = weighted_gather(grad, torch.arange(tokens)[None], ones.T)
    eps = torch.finfo(dtype).eps
    for result in (scattered, gathered):
        torch.testing.assert_close(result, torch.full((1, 2), float(tokens), dtype=dtype), rtol=eps, atol=0)


def test_dot_in_chunks(monkeypatch):
    values, slots, _, grad = make(tokens=23, dtype=torch.bfloat16)
    whole = module._dot(values, slots, grad)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": 5 * slots.shape[1] * values.shape[1]})
    torch.testing.assert_close(module._dot(values, slots, grad), whole)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": 0})
    torch.testing.assert_close(module._dot(values, slots, grad), whole)


def largest_allocation(call) -> int:
    """Bytes, the most that one operation inside `call` allocates and keeps until it returns."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_builds_all_gathered_rows(dtype):
    data = make(tokens=512, hits=32, num_slots=64, value_dim=64, dtype=dtype)
    all_rows = 512 * 32 * 64 * dtype.itemsize
    calls = [
        lambda: module._gather(*data[:3]),
        lambda: module._dot(data.values, data.slots, data.grad),
        lambda: module._scatter(*data[1:], 64),
    ]
    for call in calls:
        assert largest_allocation(call) <= all_rows / 2
    # The measure sees what it should: plain PyTorch does build them.
    assert largest_allocation(lambda: plain_gather(*data[:3])) >= all_rows


def test_deterministic():
    data = make(tokens=300, hits=8, num_slots=5, value_dim=33, dtype=torch.float32)
    first = weighted_scatter(*data[1:], 5)
    assert all(torch.equal(weighted_scatter(*data[1:], 5), first) for _ in range(5))


def requires_grad(*tensors):
    return [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]


def calls(data: Inputs):
    """Each operator as a function of its differentiable inputs, those inputs, and a plain equivalent."""
    values, slots, weights, grad = requires_grad(*data)
    rows = values.shape[0]
    return {
        "weighted_gather": (
            lambda v, w: weighted_gather(v, slots, w),
            (values, weights),
            lambda v, w: plain_gather(v, slots, w),
        ),
        "gather_dot": (
            lambda v, u: gather_dot(v, slots, u),
            (values, grad),
            lambda v, u: plain_dot(v.to(dot_dtype(v.dtype)), slots, u.to(dot_dtype(u.dtype))),
        ),
        "weighted_scatter": (
            lambda w, u: weighted_scatter(slots, w, u, rows),
            (weights, grad),
            lambda w, u: plain_scatter(slots, w, u, rows),
        ),
    }


NAMES = ("weighted_gather", "gather_dot", "weighted_scatter")


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    run, args, _ = calls(make())[name]
    torch.autograd.gradcheck(run, args)
    torch.autograd.gradgradcheck(run, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_with_fp32_weights(name, dtype):
    data = make(tokens=7, dtype=dtype, weights_dtype=torch.float32)
    run, args, plain = calls(data)[name]
    _, exact_args, _ = calls(Inputs(data[0].double(), data[1], data[2].double(), data[3].double()))[name]
    outputs = run(*args), plain(*args), plain(*exact_args)
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(outputs[0].dtype)
    found = [
        torch.autograd.grad(out, leaves, grad.to(out.dtype))
        for out, leaves in zip(outputs, (args, args, exact_args), strict=True)
    ]
    for leaf, actual, low, exact in zip(args, *found, strict=True):
        assert actual.dtype == leaf.dtype
        assert_as_accurate(actual, low, exact, name)


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_one_input_frozen(name, only):
    run, args, plain = calls(make())[name]
    mixed = [arg if position == only else arg.detach() for position, arg in enumerate(args)]
    (actual,) = torch.autograd.grad(run(*mixed).sum(), mixed[only])
    (expected,) = torch.autograd.grad(plain(*mixed).sum(), mixed[only])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, tokens):
    data = make(tokens=tokens, dtype=dtype, weights_dtype=torch.float32)
    values, slots, weights, grad = requires_grad(*data)
    torch.library.opcheck(weighted_gather, (values, slots, weights))
    torch.library.opcheck(gather_dot, (values, slots, grad))
    torch.library.opcheck(weighted_scatter, (slots, weights, grad, 11))


OPERATORS = {
    "weighted_gather": (weighted_gather, (0, 1, 2)),
    "gather_dot": (gather_dot, (0, 1, 3)),
    "weighted_scatter": (lambda s, w, u: weighted_scatter(s, w, u, 11), (1, 2, 3)),
}


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (1, 2, 1)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [0, 5])
def test_vmap(name, in_dims, tokens):
    operator, fields = OPERATORS[name]
    batch = [make(tokens=tokens, seed=seed) for seed in range(3)]
    args = [
        batch[0][field] if dim is None else torch.stack([data[field] for data in batch], dim)
        for field, dim in zip(fields, in_dims, strict=True)
    ]
    actual = torch.vmap(operator, in_dims)(*args)
    for b in range(3):
        own = [batch[0 if dim is None else b][field] for field, dim in zip(fields, in_dims, strict=True)]
        torch.testing.assert_close(actual[b], operator(*own))


def test_batched_slots_become_int64_because_the_offset_may_pass_int32():
    from memcompile.lowering.register.vmap import offset_slots

    slots = torch.tensor([[2**31 - 1]], dtype=torch.int32)
    offset = offset_slots(slots, None, 2, 2**31)
    assert offset.tolist() == [[2**31 - 1], [2**32 - 1]]


V, S, W, G = make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_gather(V[0], S, W), r"values: expected floating point \[num_slots, value_dim\]"),
        (lambda: weighted_gather(V.int(), S, W), r"values: .*int32"),
        (lambda: weighted_gather(V, S[0], W), r"slots: expected int32 or int64 \[tokens, hits\]"),
        (lambda: weighted_gather(V, S.float(), W), r"slots: .*float32"),
        (lambda: weighted_gather(V, S, W[:2]), r"weights: expected floating point \[5, 4\], got .*\[2, 4\]"),
        (lambda: gather_dot(V, S, G[:2]), r"grad: expected float64 \[5, 6\], got .*\[2, 6\]"),
        (lambda: gather_dot(V, S, G[:, :2]), r"grad: expected float64 \[5, 6\], got .*\[5, 2\]"),
        (lambda: gather_dot(V, S, G.float()), r"grad: expected float64 .*, got torch.float32"),
        (lambda: weighted_scatter(S, W, G[0], 11), r"grad: expected"),
        (lambda: weighted_scatter(S, W.int(), G, 11), r"weights: .*int32"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_slot_out_of_range_is_an_error():
    for call in (
        lambda: weighted_gather(V, S + 100, W),
        lambda: gather_dot(V, S + 100, G),
        lambda: weighted_scatter(S + 100, W, G, 11),
    ):
        with pytest.raises((RuntimeError, IndexError), match=r"range|bounds|num_embeddings"):
            call()
