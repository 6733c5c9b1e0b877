"""memory_lookup against the float64 reference, forward and backward; its shapes, dtypes and saved tensors."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from memcompile.lowering import memory_lookup
from tests.lowering.cases import (
    VARIANTS,
    Case,
    Recorder,
    assert_best,
    cases,
    gradients,
    in_dtype,
    leaves,
    weights_at,
)
from tests.lowering.reference import memory_lookup_reference, scores_reference
from tests.tolerance import assert_as_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=100)
@given(cases(dtypes=DTYPES))
def test_any_shape(case):
    """The choice is exact, the output as accurate as the rule asks, and the maths and its gradients are the
    reference's, seen in float64: on a handful of numbers rounding errors are too much a matter of luck."""
    tensors = case.tensors()
    with Recorder() as seen:
        output = memory_lookup(*tensors, **case.options)
    assert seen.scores.dtype == torch.float32
    assert_best(seen.slots, seen.scores, case.top_k)
    _, plain, exact, _ = reference_at(tensors, seen.slots, case)
    assert_as_accurate(output, plain, exact, "output")

    twin = leaves(tensors, torch.float64)
    with Recorder() as seen:
        output = memory_lookup(*twin, **case.options)
    _, _, exact, exact_tensors = reference_at(twin, seen.slots, case)
    torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-10)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(exact, exact_tensors, grad)
    torch.testing.assert_close(gradients(output, twin, grad), expected, rtol=1e-10, atol=1e-10)


def reference_at(tensors, slots, case):
    """The reference at given slots in the tensors' own dtype and in float64: (leaves, output) of each."""
    plain_tensors, exact_tensors = leaves(tensors), leaves(tensors, torch.float64)
    plain = memory_lookup_reference(*plain_tensors, **case.options, slots=slots)
    exact = memory_lookup_reference(*exact_tensors, **case.options, slots=slots)
    return plain_tensors, plain, exact, exact_tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_accurate_as_plain_pytorch(variant, dtype):
    """Two precisions may choose differently between slots that nearly tie, so the scores are compared first and
    the rest of the layer with given slots. Eight layers at once: the largest error of many is a steady measure."""
    triples: dict[str, list[tuple]] = {}
    for seed in range(8):
        case = replace(VARIANTS[variant], dtype=dtype, seed=seed, leading=(17,), half_dim=9, value_dim=21, heads=3)
        tensors = case.tensors()
        with Recorder() as seen:
            output = memory_lookup(*tensors, **case.options)
        plain_tensors, plain, exact, exact_tensors = reference_at(tensors, seen.slots, case)
        plain_scores, exact_scores = (
            scores_reference(t[0], t[1], t[2], t[3], t[9], case.heads) for t in (plain_tensors, exact_tensors)
        )
        plain_weights, exact_weights = (
            weights_at(scores, seen.slots) for scores in (plain_scores.to(seen.weights.dtype), exact_scores)
        )
        found = {"weights": (seen.weights, plain_weights, exact_weights), "output": (output, plain, exact)}
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        actual = gradients(output, tensors, grad)
        plain_found = gradients(plain, plain_tensors, grad)
        exact_found = gradients(exact, exact_tensors, grad)
        found |= {f"gradient of {n}": (actual[n], plain_found[n], exact_found[n]) for n in actual}
        for name, triple in found.items():
            triples.setdefault(name, []).append(triple)
    for name, layers in triples.items():
        assert_as_accurate(*(torch.stack(tensors) for tensors in zip(*layers, strict=True)), name=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_is_the_reference_itself(variant):
    case = in_dtype(VARIANTS[variant], torch.float64)
    tensors = case.tensors()
    actual = memory_lookup(*tensors, **case.options)
    torch.testing.assert_close(actual, memory_lookup_reference(*tensors, **case.options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    small = {"leading": (2,), "width": 2, "half_dim": 2, "n_keys": 3, "top_k": 2, "value_dim": 2}
    case = replace(in_dtype(VARIANTS[variant], torch.float64), **small)
    case = replace(case, out_dim=2 if case.out_dim else None)
    tensors = case.tensors()
    there = [t for t in tensors if t is not None]

    def run(*given_tensors):
        iterator = iter(given_tensors)
        return memory_lookup(*[None if t is None else next(iterator) for t in tensors], **case.options)

    torch.autograd.gradcheck(run, there)
    # One random direction instead of every pair of entries: ten times faster.
    torch.autograd.gradgradcheck(run, there, fast_mode=True)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("plain", torch.float32), ("full", torch.float32), ("full", torch.bfloat16), ("sigmoid", torch.bfloat16),
        ("pairs", torch.bfloat16),
    ],
)  # fmt: skip
def test_opcheck(variant, dtype):
    case = in_dtype(VARIANTS[variant], dtype)
    torch.library.opcheck(torch.ops.memcompile.memory_lookup.default, tuple(case.tensors()), case.options)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (2, 3), (1, 2, 1, 3)])
def test_leading_dimensions(leading, pairs):
    case = Case(leading=leading, pairs=pairs)
    x, *rest = case.tensors()
    output = memory_lookup(x, *rest, **case.options)
    assert output.shape == (*leading, case.out_dim)
    flat = memory_lookup(x.reshape(math.prod(leading), case.width), *rest, **case.options)
    torch.testing.assert_close(output.reshape(flat.shape), flat)
    output.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (x, *rest) if t is not None)


@pytest.mark.parametrize("layer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_may_have_a_dtype_of_their_own(variant, layer, pool):
    case = in_dtype(VARIANTS[variant], layer)
    tensors = case.tensors()
    tensors[4] = tensors[4].detach().to(pool).requires_grad_()
    output = memory_lookup(*tensors, **case.options)
    assert output.dtype == layer
    output.float().sum().backward()
    for tensor in tensors:
        assert tensor is None or tensor.grad.dtype == tensor.dtype


@pytest.mark.parametrize("pairs", [False, True])
def test_a_nan_token_is_nan_alone(pairs):
    case = Case(leading=(4,), qk_norm=True, pairs=pairs)
    x, *rest = (None if t is None else t.detach() for t in case.tensors())
    clean = memory_lookup(x, *rest, **case.options)
    for poison in (math.nan, math.inf):
        spoiled = x.clone()
        spoiled[2, 0] = poison
        output = memory_lookup(spoiled, *rest, **case.options)
        assert output[2].isnan().all()
        torch.testing.assert_close(output[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("pairs", [False, True])
def test_frozen_values_get_no_gradient_and_the_rest_does(pairs):
    case = Case(pairs=pairs)
    tensors = case.tensors()
    tensors[4].requires_grad_(False)
    memory_lookup(*tensors, **case.options).sum().backward()
    assert tensors[4].grad is None
    assert tensors[3].grad.abs().sum() > 0


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_saved_for_backward_are_slots_and_weights_never_rows_or_scores(qk_norm, pairs):
    case = Case(leading=(64,), n_keys=40, top_k=8, value_dim=96, heads=2, qk_norm=qk_norm, pairs=pairs)
    tensors = case.tensors()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        memory_lookup(*tensors, **case.options)
    given_storages = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    ours = [t for t in saved if t.untyped_storage().data_ptr() not in given_storages]
    slots = [t for t in ours if t.dtype == torch.int32]
    assert slots
    assert all(t.numel() == 64 * 2 * 8 for t in slots)
    gathered, scores = 64 * 2 * 8 * 96, 64 * 2 * 40
    keys = tensors[3].numel()
    activations = 64 * max(case.width, 96, case.out_dim)
    assert max(activations, keys) < gathered
    for tensor in ours:
        assert tensor.numel() < gathered
        assert tensor.shape[-1] != 40 or tensor.numel() < scores


@pytest.mark.parametrize("variant", ["sigmoid", "pairs"])
@pytest.mark.parametrize("values_grad", ["dense", "sparse"])
def test_a_first_slot_may_be_a_tensor(variant, values_grad):
    """Which graphs take as data; the output and the gradients are those of the number."""
    case = replace(VARIANTS[variant], tables=3)
    results = []
    for first in (case.options["first_slot"], torch.tensor(case.options["first_slot"], dtype=torch.int32)):
        tensors = case.tensors()
        output = memory_lookup(*tensors, **case.options | {"first_slot": first, "values_grad": values_grad})
        output.sum().backward()
        results.append([output, *(t.grad.to_dense() for t in tensors if t is not None)])
    for by_number, by_tensor in zip(*results, strict=True):
        assert torch.equal(by_number, by_tensor)
    of_tensor = case.options | {"slot_offset": torch.tensor(49, dtype=torch.int32)}
    del of_tensor["first_slot"]
    torch.library.opcheck(torch.ops.memcompile.memory_lookup.default, tuple(case.tensors()), of_tensor)
