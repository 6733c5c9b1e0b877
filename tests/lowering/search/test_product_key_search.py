"""product_key_search: fp32 scores whatever autocast says, exact choice, and a backward without dense scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.lowering import cpu
from tests.lowering.cases import assert_best, scores_of, weights_at
from tests.tolerance import assert_as_accurate

product_key_search = torch.ops.memcompile.product_key_search.default


def make(tokens=5, heads=2, n_keys=7, half_dim=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tokens, heads, 2 * half_dim, generator=generator, dtype=dtype)
    half_keys = torch.randn(2, heads, n_keys, half_dim, generator=generator, dtype=dtype)
    return query.requires_grad_(), half_keys.requires_grad_()


def plain_weights(query, half_keys, slots):
    """The weights of given slots in plain PyTorch."""
    return weights_at(torch.einsum("thsd,shnd->sthn", query.unflatten(-1, (2, -1)), half_keys), slots)


# A few tokens are searched one by one, more in tiles, of which the last may be partly filled. PyTorch operators sum a
# key's hits one by one, and of many hits round more than a product of matrices does.
MOST_TOKENS = 99 if cpu.load() else 9


@given(
    tokens=st.integers(0, MOST_TOKENS),
    heads=st.integers(1, 3),
    n_keys=st.integers(1, 40),
    half_dim=st.integers(1, 9),
    data=st.data(),
)
def test_scores_choice_and_gradients(tokens, heads, n_keys, half_dim, data):
    """Many searches at once: on a handful of numbers rounding errors are too much a matter of luck."""
    top_k = data.draw(st.integers(1, n_keys))
    triples = {"weights": [], "query": [], "half_keys": []}
    for seed in range(16):
        query, half_keys = make(tokens, heads, n_keys, half_dim, torch.float32, seed)
        weights, slots = product_key_search(query, half_keys, top_k)
        assert_best(slots, scores_of(query, half_keys), top_k)

        exact_inputs = [t.detach().double().requires_grad_() for t in (query, half_keys)]
        plain, exact = plain_weights(query, half_keys, slots), plain_weights(*exact_inputs, slots)
        triples["weights"].append((weights, plain, exact))
        grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
        gradients = zip(
            torch.autograd.grad(weights, (query, half_keys), grad),
            torch.autograd.grad(plain, (query, half_keys), grad),
            torch.autograd.grad(exact, exact_inputs, grad.double()),
            strict=True,
        )
        for name, triple in zip(("query", "half_keys"), gradients, strict=True):
            triples[name].append(triple)
    for name, found in triples.items():
        assert_as_accurate(*(torch.stack(tensors) for tensors in zip(*found, strict=True)), name=name)


def test_gradcheck():
    run = lambda q, k: product_key_search(q, k, 4)[0]  # noqa: E731
    torch.autograd.gradcheck(run, make())
    torch.autograd.gradgradcheck(run, make())


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(tokens, dtype):
    torch.library.opcheck(product_key_search, (*make(tokens, dtype=dtype), 4))


def test_no_tensor_of_all_scores_is_saved_or_built_in_the_backward():
    query, half_keys = make(tokens=50, heads=2, n_keys=40, half_dim=3)
    dense = 2 * 50 * 2 * 40
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        weights, _ = product_key_search(query, half_keys, 3)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as largest:
        weights.sum().backward()
    assert saved
    assert max(saved) < dense / 2
    assert 0 < largest.numel < dense / 2


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2), (2, 4)])
def test_vmap(in_dims):
    batch = [make(seed=seed) for seed in range(4)]
    stacked = [
        torch.stack([pair[side] for pair in batch], dim=dim) if dim is not None else batch[0][side]
        for side, dim in enumerate(in_dims)
    ]
    weights, slots = torch.vmap(lambda q, k: product_key_search(q, k, 4), in_dims)(*stacked)
    for b in range(4):
        query, half_keys = (batch[b if dim is not None else 0][side] for side, dim in enumerate(in_dims))
        expected_weights, expected_slots = product_key_search(query, half_keys, 4)
        torch.testing.assert_close(weights[b], expected_weights)
        assert torch.equal(slots[b], expected_slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_scores_alone(dtype):
    query, half_keys = make(dtype=torch.float32)
    expected = product_key_search(query, half_keys, 4)
    with torch.autocast("cpu", dtype=dtype):
        actual = product_key_search(query, half_keys, 4)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    ("query", "half_keys", "message"),
    [
        (torch.zeros(3, 2, 6), torch.zeros(2, 2, 7), r"half_keys: expected floating point \[2, heads, n_keys"),
        (torch.zeros(3, 2, 6), torch.zeros(3, 2, 7, 3), r"half_keys: expected"),
        (torch.zeros(3, 2, 5), torch.zeros(2, 2, 7, 3), r"query: expected float32 \[tokens, 2, 6\], got .*\[3, 2, 5\]"),
        (torch.zeros(3, 1, 6), torch.zeros(2, 2, 7, 3), r"query: "),
        (
            torch.zeros(3, 2, 6).int(),
            torch.zeros(2, 2, 7, 3).int(),
            r"half_keys: expected floating point .*, got torch.int32",
        ),
        (torch.zeros(3, 2, 6).double(), torch.zeros(2, 2, 7, 3), r"query: expected float32 .*, got torch.float64"),
        (torch.zeros(3, 2, 6), torch.zeros(2, 2, 3, 3), r"top_k: expected 1 <= top_k <= n_keys = 3, got 4"),
    ],
)
def test_errors(query, half_keys, message):
    with pytest.raises(ValueError, match=message):
        product_key_search(query, half_keys, 4)
