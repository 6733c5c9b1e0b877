"""RowAdamW is `torch.optim.AdamW` for every row: touched or not, whatever the schedule, whenever it is asked."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from memcompile.errors import OptionError
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.runtime.optim import RowAdamW
from tests.runtime.optim.sequences import ExactSequence, Sequence, sequences, train
from tests.tolerance import assert_as_accurate, largest_error

BETAS = st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.5, 0.9), (0.0, 0.99), (0.95, 0.9999)])
EPS = st.sampled_from([1e-8, 1e-4, 1.0])


def compare(ours, theirs, name, check):
    (parameter, optimizer), (dense, reference) = ours, theirs
    check(parameter, dense, f"{name} values")
    for moment in ("exp_avg", "exp_avg_sq"):
        check(optimizer.state[parameter][moment], reference.state[dense][moment], f"{name} {moment}")


@settings(max_examples=25, deadline=None)
@given(sequences(), BETAS, EPS, st.booleans())
def test_equals_dense_in_fp64(sequence, betas, eps, maximize):
    options = {"betas": betas, "eps": eps, "weight_decay": sequence.weight_decay, "maximize": maximize}
    ours = train(sequence, lambda p: RowAdamW([p], **options), torch.float64)
    theirs = train(sequence, lambda p: AdamW([p], **options), torch.float64, dense=True)

    def check(actual, exact, name):
        assert largest_error(actual, exact) <= 1e-10, name

    compare(ours, theirs, "fp64", check)


@settings(max_examples=25, deadline=None)
@given(sequences(), BETAS, EPS)
def test_as_accurate_as_dense_in_fp32(sequence, betas, eps):
    sequence = sequence.wide()
    options = {"betas": betas, "eps": eps, "weight_decay": sequence.weight_decay}
    ours, p = train(sequence, lambda p: RowAdamW([p], **options), torch.float32)
    dense, q = train(sequence, lambda p: AdamW([p], foreach=False, **options), torch.float32, dense=True)

    exact, r = train(ExactSequence(**vars(sequence)), lambda p: AdamW([p], **options), torch.float64, dense=True)
    assert_as_accurate(ours, dense, exact, "values")
    for moment in ("exp_avg", "exp_avg_sq"):
        assert_as_accurate(p.state[ours][moment], q.state[dense][moment], r.state[exact][moment], moment)


@settings(max_examples=15, deadline=None)
@given(sequences(steps=120), st.integers(0, 2**32))
def test_rows_that_are_read_are_up_to_date(sequence, seed):
    """Rows flushed before a read, in any step, have the dense values, and a flush changes nothing later."""
    snapshots = []
    make = functools.partial(AdamW, weight_decay=sequence.weight_decay)
    theirs, _ = train(
        sequence,
        lambda p: make([p]),
        torch.float64,
        dense=True,
        after_step=lambda optimizer, p, step: snapshots.append(p.detach().clone()),
    )
    generator = torch.Generator().manual_seed(seed)

    def read(optimizer, parameter, step):
        rows = torch.randint(0, sequence.slots, (2, 3), generator=generator).int()
        optimizer.flush(parameter, rows)
        rows = rows.long()
        assert largest_error(parameter[rows], snapshots[step][rows]) <= 1e-10
        if step % 41 == 40:
            optimizer.flush(parameter)
            assert largest_error(parameter, snapshots[step]) <= 1e-10

    ours, _ = train(
        sequence, lambda p: RowAdamW([p], weight_decay=sequence.weight_decay), torch.float64, after_step=read
    )
    assert largest_error(ours, theirs) <= 1e-10


def test_a_row_untouched_for_long():
    """3,000 steps after its one gradient: far more than the steps that are summed."""
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    ours, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    row, full = RowAdamW([ours], weight_decay=0.1), AdamW([dense], weight_decay=0.1)
    for step in range(3000):
        rows = torch.tensor([[1] if step == 2 else [0]])
        ours.grad = torch.sparse_coo_tensor(rows, gradient, (2, 4), check_invariants=False)
        dense.grad = ours.grad.to_dense()
        row.step()
        full.step()
    row.flush(ours, torch.tensor([1]))
    assert largest_error(ours, dense) <= 1e-12


def test_dense_gradients_touch_all_rows():
    torch.manual_seed(0)
    start = torch.randn(6, 2, 5, dtype=torch.float64)
    ours, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    row, full = RowAdamW([ours]), AdamW([dense])
    for step in range(40):
        gradient = torch.randn(6, 2, 5, dtype=torch.float64)
        dense.grad = gradient
        ours.grad = gradient if step % 3 else gradient.to_sparse(1)
        row.step()
        full.step()
    assert largest_error(ours, dense) <= 1e-12


def test_one_cycle_changes_the_betas_too():
    """OneCycleLR cycles beta1 with the learning rate: a row makes up for a step with the betas that it had."""
    sequence = Sequence(3, 200, 20, 4, "constant", 0.01)
    results = []
    for make, dense in ((RowAdamW, False), (AdamW, True)):
        parameter = nn.Parameter(sequence.initial(torch.float64))
        optimizer = make([parameter], lr=1e-3)
        scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=sequence.steps + 1)
        for gradient, _ in sequence.gradients(torch.float64):
            parameter.grad = gradient.to_dense() if dense else gradient
            optimizer.step()
            scheduler.step()
        results.append((parameter, optimizer))
    (ours, row), (dense, _) = results
    row.flush(ours)
    assert largest_error(ours, dense) <= 1e-10


def test_eps_may_change():
    sequence = Sequence(4, 100, 20, 4, "constant", 0.01)

    def change(optimizer, parameter, step):
        optimizer.param_groups[0]["eps"] = 1e-3 if step > 50 else 1e-8

    ours, _ = train(sequence, lambda p: RowAdamW([p]), torch.float64, after_step=change)
    dense, _ = train(sequence, lambda p: AdamW([p]), torch.float64, dense=True, after_step=change)
    assert largest_error(ours, dense) <= 1e-10


def test_history_is_bounded():
    """A constant rate takes one entry; a new rate in every step never more than 1,024 for so small a table."""
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = RowAdamW([parameter])
    longest = 0
    for step in range(2500):
        if step >= 400:
            optimizer.param_groups[0]["lr"] = 1e-3 + 1e-6 * step
        parameter.grad = torch.sparse_coo_tensor(torch.tensor([[step % 2]]), torch.ones(1, 2), (3, 2))
        optimizer.step()
        history = RateHistory(optimizer.state[parameter]["history"])
        assert step >= 400 or len(history) == 1
        longest = max(longest, len(history))
    assert longest == 1024 and len(history.tensor) <= 2049
    optimizer.flush(parameter)
    history = RateHistory(optimizer.state[parameter]["history"])
    assert len(history) == 0 and len(history.tensor) == 9 and history.step == 2500


def test_refusals():
    parameter = nn.Parameter(torch.zeros(3, 2))
    for options, message in (
        ({"amsgrad": True}, "amsgrad"),
        ({"betas": (0.9, 0.5)}, r"beta1\*\*2 < beta2"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
        ({"eps": 0.0}, "eps: expected positive"),
        ({"lr": -1.0}, "lr: expected 0 or more"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"state_dtype": torch.float16}, "state_dtype"),
        ({"seed": 0.5}, "seed"),
    ):
        with pytest.raises(OptionError, match=message):
            RowAdamW([parameter], **options)
    with pytest.raises(OptionError, match=r"lr \* weight_decay below 1"):
        RowAdamW([parameter], lr=1.0, weight_decay=1.0)
    optimizer = RowAdamW([parameter], lr=1.0)
    optimizer.param_groups[0]["weight_decay"] = 1.0  # as a scheduler may
    parameter.grad = torch.ones(3, 2)
    with pytest.raises(OptionError, match=r"weight_decay: expected lr \* weight_decay below 1"):
        optimizer.step()
    assert not optimizer.state and torch.equal(parameter, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="not in this optimizer"):
        optimizer.flush(nn.Parameter(torch.zeros(3, 2)))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.step()
    with pytest.raises(IndexError, match="rows 1 to 3 of a table of 3"):
        optimizer.flush(parameter, torch.tensor([1, 3]))


def test_nothing_is_missed_before_the_first_step():
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = RowAdamW([parameter])
    optimizer.flush(parameter)
    optimizer.flush(parameter, torch.tensor([0]))
    assert torch.equal(parameter, torch.ones(3, 2)) and not optimizer.state
