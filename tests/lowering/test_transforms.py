"""torch.func and forward-mode AD: reverse mode composes to any depth; forward mode raises, never returns zero."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from memcompile.lowering import memory_lookup
from tests.lowering.cases import VARIANTS, Case, in_dtype
from tests.lowering.reference import memory_lookup_reference

FULL = in_dtype(VARIANTS["full"], torch.float64)
PAIRS = in_dtype(VARIANTS["pairs"], torch.float64)
TENSORS = [t.detach() for t in FULL.tensors()]
ALL = tuple(range(len(TENSORS)))


def loss(*tensors):
    return memory_lookup(*tensors, **FULL.options).pow(2).sum()


def reference_loss(*tensors):
    return memory_lookup_reference(*tensors, **FULL.options).pow(2).sum()


def grad_norm(of):
    """A scalar function of the gradients of `of`, to be differentiated once more."""
    return lambda *tensors: sum(g.pow(2).sum() for g in grad(of, ALL)(*tensors))


def test_grad():
    torch.testing.assert_close(grad(loss, ALL)(*TENSORS), grad(reference_loss, ALL)(*TENSORS))


def test_grad_of_grad():
    actual = grad(grad_norm(loss), ALL)(*TENSORS)
    torch.testing.assert_close(actual, grad(grad_norm(reference_loss), ALL)(*TENSORS))


def third_derivative(of):
    """Three levels of grad, of the query's weight alone to keep it quick."""

    def first(weight):
        return grad(lambda w: of(TENSORS[0], w, *TENSORS[2:]))(weight).pow(2).sum()

    return grad(lambda weight: grad(first)(weight).sum())(TENSORS[1])


def test_grad_of_grad_of_grad():
    torch.testing.assert_close(third_derivative(loss), third_derivative(reference_loss))


def test_create_graph():
    results = []
    for of in (loss, reference_loss):
        tensors = [t.clone().requires_grad_() for t in TENSORS]
        first = torch.autograd.grad(of(*tensors), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors))
    torch.testing.assert_close(*results)


BATCHES = {
    "tokens": (0,) + (None,) * 9,
    "all": (0,) * 10,
    "keys and gate": (None, 0, None, 0, None, 0, None, None, None, None),
    "values": (None,) * 4 + (0,) + (None,) * 5,
}


def batched(in_dims):
    return [
        t if dim is None else torch.stack([t, 0.7 * t, 1.3 * t], dim) for t, dim in zip(TENSORS, in_dims, strict=True)
    ]


@pytest.mark.parametrize("batch", BATCHES)
def test_vmap(batch):
    in_dims = BATCHES[batch]
    stacked = batched(in_dims)
    actual = vmap(lambda *t: memory_lookup(*t, **FULL.options), in_dims)(*stacked)
    for b in range(3):
        own = [t if dim is None else t[b] for t, dim in zip(stacked, in_dims, strict=True)]
        torch.testing.assert_close(actual[b], memory_lookup(*own, **FULL.options))


@pytest.mark.parametrize("batch", BATCHES)
def test_vmap_of_grad(batch):
    in_dims = BATCHES[batch]
    stacked = batched(in_dims)
    actual = vmap(grad(loss, ALL), in_dims)(*stacked)
    torch.testing.assert_close(actual, vmap(grad(reference_loss, ALL), in_dims)(*stacked))


def test_grad_of_vmap():
    in_dims = BATCHES["tokens"]
    stacked = batched(in_dims)
    actual = grad(lambda *t: vmap(loss, in_dims)(*t).pow(2).sum(), ALL)(*stacked)
    expected = grad(lambda *t: vmap(reference_loss, in_dims)(*t).pow(2).sum(), ALL)(*stacked)
    torch.testing.assert_close(actual, expected)


def test_vmap_does_not_loop_over_the_batch():
    """One search and one gather for the whole batch, not one for each element."""
    seen = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        vmap(lambda *t: memory_lookup(*t, **FULL.options), BATCHES["all"])(*batched(BATCHES["all"]))
    assert seen.count("memcompile::product_key_search") == 1
    assert seen.count("memcompile::weighted_gather") == 1


@pytest.mark.parametrize("batched_values", [False, True])
def test_pairs_to_any_order_and_in_batches(batched_values):
    """Gradients of gradients, in torch.func and by create_graph; and these of a batch."""
    tensors = [None if t is None else t.detach() for t in PAIRS.tensors()]
    x, values = tensors[0], tensors[4]

    def norm(of):
        def scalar(x, weight, values):
            return of(x, weight, *tensors[2:4], values, *tensors[5:], **PAIRS.options).pow(2).sum()

        return scalar, lambda *args: sum(g.pow(2).sum() for g in grad(scalar, (0, 1, 2))(*args))

    (ours, our_norm), (exact, exact_norm) = norm(memory_lookup), norm(memory_lookup_reference)
    args = x, tensors[1], values
    torch.testing.assert_close(grad(our_norm, (0, 1, 2))(*args), grad(exact_norm, (0, 1, 2))(*args))

    leaves = [t.clone().requires_grad_() for t in args]
    first = torch.autograd.grad(ours(*leaves), leaves, create_graph=True)
    found = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
    torch.testing.assert_close(found, grad(exact_norm, (0, 1, 2))(*args))

    in_dims = (0, None, 0 if batched_values else None)
    stacked = [t if dim is None else torch.stack([t, 0.7 * t]) for t, dim in zip(args, in_dims, strict=True)]
    batches = (vmap(grad(of, (0, 1, 2)), in_dims)(*stacked) for of in (ours, exact))
    torch.testing.assert_close(*batches)


def test_functional_call():
    class Memory(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(TENSORS[1:])

        def forward(self, x):
            return memory_lookup(x, *self.tensors, **FULL.options)

    module = Memory()
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    actual = grad(lambda p: functional_call(module, p, (TENSORS[0],)).sum())(doubled)
    expected = grad(
        lambda p: memory_lookup_reference(TENSORS[0], *(p[f"tensors.{i}"] for i in range(9)), **FULL.options).sum()
    )(doubled)
    torch.testing.assert_close(actual, expected)


def operators():
    """Every operator of the layer as a function of one differentiable tensor, once for each such tensor."""
    ops = torch.ops.memcompile
    scores = torch.randn(2, 3, 2, 5)
    query, keys = torch.randn(3, 2, 4), torch.randn(2, 2, 5, 2)
    values, grad_rows = torch.randn(9, 6), torch.randn(3, 6)
    slots, weights = torch.randint(0, 9, (3, 4)), torch.randn(3, 4)
    yield "product_key_topk", lambda t: ops.product_key_topk(t, 3)[0], scores
    yield "product_key_search", lambda t: ops.product_key_search(t, keys, 3)[0], query
    yield "product_key_search", lambda t: ops.product_key_search(query, t, 3)[0], keys
    yield "weighted_gather", lambda t: ops.weighted_gather(t, slots, weights), values
    yield "weighted_gather", lambda t: ops.weighted_gather(values, slots, t), weights
    yield "gather_dot", lambda t: ops.gather_dot(t, slots, grad_rows), values
    yield "gather_dot", lambda t: ops.gather_dot(values, slots, t), grad_rows
    yield "weighted_scatter", lambda t: ops.weighted_scatter(slots, t, grad_rows, 9), weights
    yield "weighted_scatter", lambda t: ops.weighted_scatter(slots, weights, t, 9), grad_rows
    yield "pair_gather", lambda t: ops.pair_gather(t, slots, weights, grad_rows[:, :2])[0], values
    yield "pair_gather", lambda t: ops.pair_gather(values, slots, weights, t)[0], grad_rows[:, :2].clone()


FORWARD_MODE = list(operators())


@pytest.mark.parametrize("case", FORWARD_MODE, ids=[f"{i}-{c[0]}" for i, c in enumerate(FORWARD_MODE)])
def test_forward_mode_raises(case):
    name, run, tensor = case
    message = f"memcompile::{name} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        jvp(run, (tensor,), (torch.ones_like(tensor),))
    with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
        run(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
    with pytest.raises(NotImplementedError, match=message):
        # The tangent meets the operator one level outside a grad.
        jvp(grad(lambda t: run(t).pow(2).sum()), (tensor,), (torch.ones_like(tensor),))
    with pytest.raises(NotImplementedError, match=message), torch.no_grad():
        jvp(run, (tensor,), (torch.ones_like(tensor),))


@pytest.mark.parametrize("position", range(5))
def test_forward_mode_of_the_layer_raises(position):
    """x, query_weight, query_bias, half_keys and values: all that reach the search or the gather."""

    def run(tensor):
        return memory_lookup(*TENSORS[:position], tensor, *TENSORS[position + 1 :], **FULL.options)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(run, (TENSORS[position],), (torch.ones_like(TENSORS[position]),))


def test_hessian_forward_over_reverse_raises_and_reverse_over_reverse_works():
    case = Case(leading=(2,), width=3, n_keys=3, top_k=2, dtype=torch.float64)
    x, *rest = (None if t is None else t.detach() for t in case.tensors())
    of = lambda t: memory_lookup(t, *rest, **case.options).pow(2).sum()  # noqa: E731
    plain = lambda t: memory_lookup_reference(t, *rest, **case.options).pow(2).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        hessian(of)(x)
    torch.testing.assert_close(jacrev(jacrev(of))(x), hessian(plain)(x))
