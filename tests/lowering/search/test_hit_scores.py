"""The balance loss: its value, and that each backward through the output has its gradient, eager and compiled."""

from dataclasses import replace

import pytest
import torch
from torch.func import grad, vmap

from memcompile.lowering import memory_lookup
from memcompile.lowering.search.hit_scores import balance_of
from tests.lowering.cases import Case, Recorder, gradients, leaves
from tests.lowering.reference import balance_reference, memory_lookup_reference, scores_reference

CASE = Case(dtype=torch.float64, leading=(3, 4), qk_norm=True)
FACTOR = 0.3


def loss_of(case, tensors):
    with Recorder() as seen:
        memory_lookup(*tensors, **case.options)
    scores = scores_reference(*tensors[:4], tensors[9], case.heads)
    return FACTOR * balance_reference(scores, seen.slots), seen.slots


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_output_carries_the_gradient_of_the_loss(weighting, backend):
    case = replace(CASE, weighting=weighting)
    tensors, twin = case.tensors(), leaves(case.tensors())

    def run(*given_tensors):
        return memory_lookup(*given_tensors, **case.options, balance_loss=FACTOR)

    output = (run if backend is None else torch.compile(run, backend=backend, fullgraph=True))(*tensors)
    loss, slots = loss_of(case, twin)
    expected = memory_lookup_reference(*twin, **case.options, slots=slots)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = gradients(output, tensors, seed)
    total = (expected * seed).sum() + loss
    expected = gradients(total, twin, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(actual["half_keys"], gradients(run(*tensors), tensors, 0 * seed)["half_keys"])


def test_what_the_loop_multiplies_its_loss_by_is_not_of_this_one():
    tensors = CASE.tensors()
    run = lambda: memory_lookup(*tensors, **CASE.options, balance_loss=FACTOR)  # noqa: E731
    loss, _ = loss_of(CASE, tensors)
    (expected,) = torch.autograd.grad(loss, tensors[3])
    (actual,) = torch.autograd.grad(0 * run().sum(), tensors[3])
    torch.testing.assert_close(actual, expected)


def test_it_is_one_where_hits_are_even_and_n_where_all_is_of_one_key():
    n_keys, tokens = 5, 10
    half_keys = torch.zeros(2, 1, n_keys, 3)
    slots = torch.arange(n_keys).repeat(2)[:, None, None] * (n_keys + 1)  # (0, 0), (1, 1), ...
    assert balance_of(torch.randn(tokens, 1, 2, 3), half_keys, slots) == pytest.approx(1)
    half_keys[:, :, 2] = 1e4
    assert balance_of(torch.ones(tokens, 1, 2, 3), half_keys, 0 * slots + 2 * (n_keys + 1)) == pytest.approx(n_keys)
    assert balance_of(torch.ones(0, 1, 2, 3), half_keys, slots[:0]) == 0


def test_under_transforms():
    x, *rest = (None if t is None else t.detach() for t in CASE.tensors())

    def main(x):
        return memory_lookup(x, *rest, **CASE.options).sum()

    def with_loss(x):
        return memory_lookup(x, *rest, **CASE.options, balance_loss=FACTOR).sum()

    of_loss = grad(lambda x: loss_of(CASE, [x, *rest])[0])
    torch.testing.assert_close(grad(with_loss)(x), grad(main)(x) + of_loss(x))
    expected = torch.stack([grad(with_loss)(one) for one in x])
    torch.testing.assert_close(vmap(grad(with_loss))(x), expected)


def test_no_tokens_have_no_gradient():
    tensors = replace(CASE, leading=(0,)).tensors()
    memory_lookup(*tensors, **CASE.options, balance_loss=FACTOR).sum().backward()
    assert not any(t.grad.any() for t in tensors if t is not None)


def test_float16_is_refused():
    tensors = replace(CASE, dtype=torch.float16).tensors()
    with pytest.raises(NotImplementedError, match="no loss scale, which float16 needs"):
        memory_lookup(*tensors, **CASE.options, balance_loss=FACTOR)
