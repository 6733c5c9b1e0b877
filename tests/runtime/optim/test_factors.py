"""A step by the factors of a gradient is that of the gradient, bit for bit."""

import pytest
import torch
from torch import nn

from memcompile.lowering import operator
from memcompile.lowering.gather.table_gather import coalesced
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad

OPTIMIZERS = {
    "RowAdamW": lambda p: RowAdamW([p], weight_decay=0.1),
    "RowAdamW in bf16": lambda p: RowAdamW([p], state_dtype=torch.bfloat16, maximize=True),
    "LazyAdam": lambda p: LazyAdam([p], weight_decay=0.1),
    "RowwiseAdagrad": lambda p: RowwiseAdagrad([p]),
    "RowSGD": lambda p: RowSGD([p], weight_decay=0.1, maximize=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factors(name, dtype):
    if "bf16" in name and dtype is torch.float64:
        pytest.skip("moments of float64 parameters are float64")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(30, 21, generator=generator).to(dtype)
    by_factors, by_gradient = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, other = OPTIMIZERS[name](by_factors), OPTIMIZERS[name](by_gradient)
    for tokens in (5, 0, 7, 1):
        slots = torch.randint(0, 30, (tokens, 4), generator=generator).int()
        weights = torch.rand(tokens, 4, generator=generator)
        grad = torch.randn(tokens, 21, generator=generator).to(dtype)
        one.step_by_factors(by_factors, slots, weights, grad)
        by_gradient.grad = coalesced(*operator("row_sums")(slots, weights, grad, 30), 30)
        other.step()
    assert torch.equal(by_factors, by_gradient)
    for ours, theirs in zip(one.state[by_factors].values(), other.state[by_gradient].values(), strict=True):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


def test_a_parameter_of_another_optimizer():
    optimizer = RowAdamW([nn.Parameter(torch.ones(3, 2))])
    with pytest.raises(ValueError, match="not in this optimizer"):
        optimizer.step_by_factors(torch.ones(3, 2), torch.zeros(1, 1).int(), torch.ones(1, 1), torch.ones(1, 2))
