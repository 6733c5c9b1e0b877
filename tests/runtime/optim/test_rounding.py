"""bf16: unbiased under a seed, the nearest to the masters where there are any, moments that do not stall."""

import pytest
import torch
from torch import nn

from memcompile.lowering.update.stochastic_rounding import round_rows, seed_of_step
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad
from tests.runtime.optim.sequences import Sequence, train


def test_rounds_up_and_down_with_the_right_odds():
    x = torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 3 * 2**-9, -3.1, 0.0, 1e-30, float("inf"), -float("inf"), float("nan")])
    rows = torch.arange(20_000)
    rounded = round_rows(x.expand(len(rows), -1), rows, seed_of_step(7, 3), 0).double()
    assert torch.equal(rounded[:, :1], torch.ones(len(rows), 1)) and (rounded[:, 4] == 0).all()
    assert (rounded[:, 6] == float("inf")).all() and (rounded[:, 7] == -float("inf")).all()
    assert rounded[:, 8].isnan().all()
    for column in (1, 2, 3, 5):
        step = rounded[:, column].max() - rounded[:, column].min()
        assert step <= abs(float(x[column])) * 2**-7
        # Within five standard deviations of a mean of coin tosses.
        assert abs(rounded[:, column].mean() - x[column].double()) < 5 * step / 2 / len(rows) ** 0.5


def test_seed_step_table_row_and_column_matter():
    x = torch.full((2, 64), 1.0 + 2**-9)
    rows = torch.tensor([3, 4])
    first = round_rows(x, rows, seed_of_step(0, 1), 0)
    assert torch.equal(first, round_rows(x, rows, seed_of_step(0, 1), 0))
    others = [(seed_of_step(0, 2), 0), (seed_of_step(1, 1), 0), (seed_of_step(2**40, 1), 0), (seed_of_step(0, 1), 1)]
    for seed, table in others:
        assert not torch.equal(first, round_rows(x, rows, seed, table))
    assert not torch.equal(first[0], first[1]) and len(first[0].unique()) == 2
    # A row rounds alike whatever stands beside it.
    assert torch.equal(first[1:], round_rows(x[1:], rows[1:], seed_of_step(0, 1), 0))


@pytest.mark.parametrize("make", [RowAdamW, LazyAdam, RowwiseAdagrad, RowSGD])
def test_masters_are_an_fp32_run(make):
    sequence = Sequence(0, 100, 20, 8, "warm-up and cosine", 0.1)

    class Rounded(Sequence):
        def gradients(self, dtype):
            return ((grad.to(dtype), lr) for grad, lr in super().gradients(torch.bfloat16))

        def initial(self, dtype):
            return super().initial(torch.bfloat16).to(dtype)

    rounded = Rounded(**vars(sequence))
    values, optimizer = train(rounded, lambda p: make([p], master_weights=True), torch.bfloat16)
    exact, plain = train(rounded, lambda p: make([p]), torch.float32)
    assert torch.equal(optimizer.state[values]["master"], exact)
    assert torch.equal(values, exact.bfloat16())
    assert "master" not in plain.state[exact]


@pytest.mark.parametrize("make", [RowAdamW, LazyAdam, RowwiseAdagrad, RowSGD])
def test_bf16_values_do_not_stall(make):
    """Steps far below a bf16 step add up on average; rounded to the nearest, they would all be lost."""
    values = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    exact = nn.Parameter(torch.ones(64, 256))
    for parameter in (values, exact):
        optimizer = make([parameter], lr=1e-4)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    moved = 1 - values.double().mean(), 1 - exact.double().mean()
    assert abs(moved[0] - moved[1]) < 0.05 * moved[1]


@pytest.mark.parametrize("make", [RowAdamW, LazyAdam])
def test_bf16_moments(make):
    """beta2 = 0.999 changes exp_avg_sq by less than half a bf16 step: only stochastic rounding lets it decay."""
    ours = nn.Parameter(torch.ones(32, 256))
    optimizer = make([ours], state_dtype=torch.bfloat16)
    ours.grad = torch.ones_like(ours)
    optimizer.step()
    for _ in range(200):
        ours.grad = torch.zeros_like(ours)
        optimizer.step()
    state = optimizer.state[ours]
    assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.bfloat16
    expected = 0.001 * 0.999**200
    assert abs(state["exp_avg_sq"].double().mean() - expected) < 0.01 * expected


def test_bf16_moments_of_skipped_steps():
    """The same decay where the steps are skipped, and rounded once."""
    ours = nn.Parameter(torch.ones(32, 256))
    optimizer = RowAdamW([ours], state_dtype=torch.bfloat16)
    ours.grad = torch.ones_like(ours)
    optimizer.step()
    for _ in range(200):
        ours.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 256), (32, 256))
        optimizer.step()
    optimizer.flush(ours)
    expected = 0.001 * 0.999**200
    assert abs(optimizer.state[ours]["exp_avg_sq"].double().mean() - expected) < 0.002 * expected
