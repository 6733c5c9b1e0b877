"""Rows that are behind are read as they are by now, and reading changes nothing."""

import copy

import pytest
import torch

from memcompile.runtime.optim import RowAdamW, RowSGD
from tests.runtime.optim.sequences import Sequence, train

OPTIMIZERS = {
    "RowAdamW": lambda p: RowAdamW([p], weight_decay=0.1),
    "RowAdamW in bf16": lambda p: RowAdamW([p], state_dtype=torch.bfloat16),
    "RowAdamW with masters": lambda p: RowAdamW([p], master_weights=True),
    "RowSGD": lambda p: RowSGD([p], weight_decay=0.1),
    "RowSGD with masters": lambda p: RowSGD([p], weight_decay=0.1, master_weights=True),
}


def close(actual, left, right, dtype):
    """Whether it is the product, in which roundings of `dtype` do not add up to more than two steps of its terms."""
    actual, exact = actual.double().view(len(left), -1), (left @ right).squeeze(1)
    assert ((actual - exact).abs() <= 4 * torch.finfo(dtype).eps * (left.abs() @ right.abs()).squeeze(1)).all()


@pytest.mark.parametrize("schedule", ["constant", "warm-up and cosine"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reads(name, schedule):
    sequence = Sequence(1, 60, 30, 37, schedule, 0.1)
    dtype = torch.bfloat16 if "masters" in name else torch.float32
    generator = torch.Generator().manual_seed(0)
    seen = 0

    def read(optimizer, parameter, step):
        nonlocal seen
        slots = torch.randint(0, 30, (4, 6), generator=generator).int()
        weights = torch.rand(4, 6, generator=generator)
        grad = torch.randn(4, 37, generator=generator).to(dtype)
        before = copy.deepcopy((parameter, optimizer.state[parameter], parameter._version))
        gathered = optimizer.current_gather(parameter, slots, weights)
        dots = optimizer.current_dot(parameter, slots, grad)
        after = (parameter, optimizer.state[parameter], parameter._version)
        assert torch.equal(before[0], after[0]) and before[2] == after[2]
        assert before[1].keys() == after[1].keys()
        for old, new in zip(before[1].values(), after[1].values(), strict=True):
            assert torch.equal(old, new) if torch.is_tensor(old) else old == new
        seen += bool((optimizer.state[parameter]["last_step"][slots.long()] != step + 1).any())
        twin = torch.nn.Parameter(parameter.detach().clone())
        other = copy.deepcopy(optimizer)
        other.param_groups[0]["params"], other.state = [twin], {twin: copy.deepcopy(optimizer.state[parameter])}
        other.flush(twin, slots)
        rows = twin.detach()[slots.long()].double()
        assert gathered.dtype is dtype and dots.dtype is torch.float32
        close(gathered, weights.double().unsqueeze(1), rows, dtype)
        close(dots.unsqueeze(1), grad.double().unsqueeze(1), rows.mT, dtype)

    train(sequence, OPTIMIZERS[name], dtype, after_step=read)
    assert seen > 30
