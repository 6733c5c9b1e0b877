"""pair_gather, pair_grads and pair_scatter against plain PyTorch in float64, and the gradients that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memcompile.lowering import cpu, operator
from memcompile.lowering.gather import pairs as module
from memcompile.lowering.register.kernels import IN_PYTORCH
from tests.lowering.gather.test_row_state import assert_reads
from tests.lowering.gather.test_weighted_gather import DTYPES, drawn_rows, drawn_slots, largest_allocation
from tests.lowering.reference import pair_gather_reference

NAMES = ("pair_gather", "pair_grads", "pair_scatter")
pair_gather, pair_grads, pair_scatter = map(operator, NAMES)
row_sums = operator("row_sums")


class Pairs(NamedTuple):
    """A token's hits in a table of pairs, and a gradient of what is gathered."""

    values: Tensor  # [num_slots, d + value_dim]
    slots: Tensor  # [tokens, hits]
    weights: Tensor  # [tokens, hits]
    x: Tensor  # [tokens, d]
    grad: Tensor  # [tokens, value_dim]

    def double(self) -> Pairs:
        return Pairs(*(t.double() if t.is_floating_point() else t for t in self))


def make(
    tokens: int = 5,
    hits: int = 4,
    num_slots: int = 11,
    d: int = 6,
    value_dim: int = 3,
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int32,
    strided: bool = False,
    seed: int = 0,
) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    slots, rand = drawn_slots(generator, tokens, hits, num_slots, index_dtype, strided), drawn_rows(generator, strided)
    return Pairs(
        rand(num_slots, d + value_dim, dtype),
        slots,
        rand(tokens, hits, weights_dtype or dtype),
        rand(tokens, d, dtype),
        rand(tokens, value_dim, dtype),
    )


def drawn_pairs_of(dtypes: Sequence[torch.dtype]) -> st.SearchStrategy[Pairs]:
    return st.builds(
        make,
        tokens=st.integers(0, 9),
        hits=st.integers(1, 20),
        num_slots=st.integers(1, 13),
        d=st.sampled_from([1, 5, 16, 33, 70]),
        value_dim=st.sampled_from([1, 4, 19, 32, 75]),
        dtype=st.sampled_from(dtypes),
        weights_dtype=st.sampled_from([None, torch.float32]),
        index_dtype=st.sampled_from([torch.int32, torch.int64]),
        strided=st.booleans(),
        seed=st.integers(0, 1000),
    )


drawn_pairs = drawn_pairs_of(DTYPES)


def leaves_of(data: Pairs) -> list[Tensor]:
    """Fresh leaves of the values, the weights and x."""
    return [t.detach().clone().requires_grad_() for t in (data.values, data.weights, data.x)]


def reference(data: Pairs) -> list[Tensor]:
    """y, and the gradients of values, weights and x, by PyTorch's autograd in the dtype of the data."""
    values, weights, x = leaves_of(data)
    y = pair_gather_reference(values, data.slots, weights, x)
    return [y.detach(), *torch.autograd.grad(y, (values, weights, x), data.grad)]


def assert_pairs(compute: Callable[[Pairs], list[Tensor]], dtype: torch.dtype, examples: int = 50) -> None:
    """What `compute` finds is as accurate as plain PyTorch in the same dtype: over all examples, since the sums of one
    cancel by luck.
    """
    found: dict[str, list[tuple[Tensor, ...]]] = {}

    @settings(max_examples=examples)
    @given(drawn_pairs_of([dtype]))
    def run(data: Pairs) -> None:
        results = zip(compute(data), reference(data), reference(data.double()), strict=True)
        for name, (actual, plain, exact) in zip(("y", "values", "weights", "x"), results, strict=True):
            key = f"{name} in {actual.dtype}"
            found.setdefault(key, []).append((actual.flatten(), plain.flatten().to(actual.dtype), exact.flatten()))

    run()
    for name, triples in found.items():
        assert_reads(*(torch.cat(tensors) for tensors in zip(*triples, strict=True)), name)


def by_operators(data: Pairs) -> list[Tensor]:
    """The same by the operators as they are."""
    values, slots, weights, x, grad = data
    y, dots = pair_gather(values, slots, weights, x)
    of_weights, of_x, into, out = pair_grads(values, slots, weights, x, dots, grad)
    of_values = pair_scatter(slots, into, x, out, grad, values.shape[0])
    rows, sums = row_sums(slots, into, x, values.shape[0], out, grad)
    assert torch.equal(rows, slots.unique().long()) and torch.equal(of_values[rows], sums)
    assert (of_values.index_fill(0, rows, 0) == 0).all()
    return [y, of_values, of_weights.to(weights.dtype), of_x]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype):
    assert_pairs(by_operators, dtype)


@given(drawn_pairs)
def test_autograd_is_made_of_the_operators(drawn):
    values, weights, x = leaves_of(drawn)
    y, dots = pair_gather(values, drawn.slots, weights, x)
    assert y.requires_grad and not dots.requires_grad
    found = [y.detach(), *torch.autograd.grad(y, (values, weights, x), drawn.grad)]
    assert all(map(torch.equal, found, by_operators(drawn)))


def in_pytorch(data: Pairs) -> list[Tensor]:
    """The same by the kernels in PyTorch's operators, which run where a device has none of its own."""
    values, slots, weights, x, grad = data
    y, dots = IN_PYTORCH["pair_gather"](values, slots, weights, x)
    of_weights, of_x, into, out = IN_PYTORCH["pair_grads"](values, slots, weights, x, dots, grad)
    of_values = IN_PYTORCH["pair_scatter"](slots, into, x, out, grad, values.shape[0])
    found = [y, of_values, of_weights.to(weights.dtype), of_x]
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in by_operators(data)]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_in_pytorch(dtype):
    assert_pairs(in_pytorch, dtype)


def test_gelu_is_exact_where_it_is_small_and_where_it_is_large():
    """In each of many dots, -12 to 12: gelu and its derivative, each by its own weight. To rounding of each number: the
    C++ kernels take Phi(z) as erfc. PyTorch's gelu takes it as 1 + erf, which is exact to rounding of 1.
    """
    z = torch.linspace(-12, 12, 241, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        values = torch.stack([z, torch.ones_like(z)], 1).to(dtype)
        slots, one = torch.arange(241)[:, None], torch.ones(241, 1, dtype=dtype)
        y, dots = pair_gather(values, slots, one, one)
        of_weights, of_x, into, out = pair_grads(values, slots, one, one, dots, one)
        u = values[:, 0].double()
        below, density = torch.special.erfc(-u / 2**0.5) / 2, torch.exp(-u * u / 2) / (2 * torch.pi) ** 0.5
        rounding = 2 * torch.finfo(dtype).eps * (2 + u * u)  # an error of u is one of Phi(u), times u * u
        of_sum = 12 * torch.finfo(dtype).eps * (not cpu.load())
        for found in (y, of_weights, out):
            assert ((found[:, 0] - u * below).abs() <= rounding * (u * below).abs() + of_sum).all()
        slope, terms = below + u * density, below + (u * density).abs()
        assert ((into[:, 0] - slope).abs() <= rounding * terms + of_sum).all()
        assert ((of_x[:, 0] - slope * u).abs() <= (rounding * terms + of_sum) * u.abs()).all()


def test_gradcheck():
    data = make()
    run = lambda v, w, x: pair_gather(v, data.slots, w, x)[0]  # noqa: E731
    torch.autograd.gradcheck(run, leaves_of(data))
    torch.autograd.gradgradcheck(run, leaves_of(data))


@pytest.mark.parametrize("learns", [(0,), (1,), (2,), (0, 2)])
def test_what_is_frozen_gets_no_gradient(learns):
    data = make()
    expected = dict(enumerate(reference(data)[1:]))
    tensors = [t.requires_grad_(i in learns) for i, t in enumerate(leaves_of(data))]
    pair_gather(tensors[0], data.slots, *tensors[1:])[0].backward(data.grad)
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (i in learns)
        if i in learns:
            torch.testing.assert_close(tensor.grad, expected[i])


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, tokens):
    data = make(tokens=tokens, dtype=dtype, weights_dtype=torch.float32)
    for learns in (False, True):
        values, weights, x = (t.requires_grad_(learns) for t in leaves_of(data))
        torch.library.opcheck(pair_gather, (values, data.slots, weights, x))
    _, dots = pair_gather(*data[:4])
    torch.library.opcheck(pair_grads, (*data[:4], dots, data.grad))
    torch.library.opcheck(pair_scatter, (data.slots, dots, data.x, dots, data.grad, 11))
    torch.library.opcheck(row_sums, (data.slots, dots, data.x, 11, dots, data.grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_builds_all_gathered_rows(dtype):
    data = make(tokens=512, hits=32, num_slots=64, d=64, value_dim=64, dtype=dtype)
    all_rows = 512 * 32 * 128 * dtype.itemsize
    dots = module._gather(*data[:4])[1]
    for call in (
        lambda: module._gather(*data[:4]),
        lambda: module._grads(*data[:4], dots, data.grad),
        lambda: module._scatter(data.slots, dots, data.x, dots, data.grad, 64),
        lambda: by_operators(data),
    ):
        assert largest_allocation(call) <= all_rows / 2
    assert largest_allocation(lambda: pair_gather_reference(*data[:4])) >= all_rows  # the measure sees it


def test_nothing_is_gathered_of_a_table_of_no_columns_out():
    """Rows of u alone, or of v alone, are pairs too: the operators take them, though no layer has them."""
    values, slots, weights, x, _ = make(value_dim=0)
    y, dots = pair_gather(values, slots, weights, x)
    assert y.shape == (5, 0)
    torch.testing.assert_close(dots, torch.einsum("thd,td->th", values[slots.long()], x))
    y, dots = pair_gather(values, slots, weights, x[:, :0])
    assert (dots == 0).all() and (y == 0).all() and y.shape == (5, 6)


V, S, W, X, G = make()
Z = torch.zeros(5, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_gather(V[0], S, W, X), r"values: expected floating point \[num_slots, d \+ value_dim\]"),
        (lambda: pair_gather(V, S[0], W, X), r"slots: expected int32 or int64 \[tokens, hits\]"),
        (lambda: pair_gather(V, S, W[:2], X), r"weights: expected floating point \[5, 4\], got .*\[2, 4\]"),
        (lambda: pair_gather(V, S, W, X[:2]), r"x: expected float64 \[5, d\], got .*\[2, 6\]"),
        (lambda: pair_gather(V, S, W, X.float()), r"x: expected float64 .*, got torch.float32"),
        (lambda: pair_gather(V[:, :5], S, W, X), r"values: expected rows of d \+ value_dim with d = 6, got \[11, 5\]"),
        (lambda: pair_grads(V, S, W, X, Z.float(), G), r"dots"),
        (lambda: pair_grads(V, S, W, X, Z, X), r"grad"),
        (lambda: pair_scatter(S, Z, X, Z, G.float(), 11), r"more_grad: expected float64|one dtype"),
        (lambda: pair_scatter(S, Z, X, Z[:2], G, 11), r"weights.* \["),
        (lambda: row_sums(S, Z, X, 11, Z), "more_weights and more_grad"),
        (lambda: pair_gather(V, S + 100, W, X), "range|bounds"),
        (lambda: pair_grads(V, S - 100, W, X, Z, G), "range|bounds"),
        (lambda: pair_scatter(S + 100, Z, X, Z, G, 11), "range|bounds"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, RuntimeError, IndexError), match=message):
        call()
