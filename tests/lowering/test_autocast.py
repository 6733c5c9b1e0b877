"""Under autocast the projections take its dtype; scores, choice and softmax stay in float32."""

import pytest
import torch
import torch.nn.functional as F

from memcompile.lowering import memory_lookup
from tests.lowering.cases import VARIANTS, Case, Recorder, assert_best
from tests.lowering.reference import product_key_topk_reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradient_dtypes(variant, dtype):
    case = VARIANTS[variant]
    tensors = case.tensors()
    with torch.autocast("cpu", dtype=dtype):
        output = memory_lookup(*tensors, **case.options)
        assert output.dtype == F.linear(tensors[0], tensors[1]).dtype == dtype
    output.float().sum().backward()
    for tensor in tensors:
        assert tensor is None or (tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_choice_is_that_of_float32_scores_of_the_projected_query(dtype):
    case = Case(leading=(40,), n_keys=30, top_k=16, half_dim=8)
    tensors = case.tensors()
    with torch.autocast("cpu", dtype=dtype), Recorder() as seen:
        memory_lookup(*tensors, **case.options)
        query = F.linear(tensors[0], tensors[1], tensors[2])
    halves = query.detach().float().reshape(40, 2, 2, 8)
    scores = torch.einsum("thsd,shnd->sthn", halves, tensors[3].detach())
    assert seen.scores.dtype == seen.weights.dtype == torch.float32
    torch.testing.assert_close(seen.scores, scores)
    # bf16 scores would tie and reorder; so would keys rounded to the autocast dtype.
    assert_best(seen.slots, scores, 16)
    low_scores = torch.einsum("thsd,shnd->sthn", halves.to(dtype), tensors[3].detach().to(dtype)).float()
    assert not torch.equal(seen.slots.long(), product_key_topk_reference(low_scores, 16)[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_under_autocast(backend):
    case = VARIANTS["full"]
    tensors = [None if t is None else t.detach() for t in case.tensors()]
    compiled = torch.compile(lambda *t: memory_lookup(*t, **case.options), backend=backend, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = memory_lookup(*tensors, **case.options), compiled(*tensors)
    assert actual.dtype == torch.bfloat16
    # Inductor may keep an intermediate in fp32 that eager rounds to bf16.
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)


def test_the_ambient_autocast_survives():
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory_lookup(*case.tensors(), **case.options)
        assert torch.is_autocast_enabled("cpu")
