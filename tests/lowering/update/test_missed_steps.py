"""The sum over skipped steps: its error bound, how many terms and panels it takes, and its history of rates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.lowering import operator
from memcompile.lowering.update.missed_steps import _terms, factors_of_step, missed_steps
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.lowering.update.row_adam import moments_of, steps_a_moment


def history_of(rates, betas=(0.9, 0.999)):
    history = RateHistory.new(0)
    for lr, weight_decay in rates:
        history.record(lr, factors_of_step(lr, weight_decay, betas))
    return history


def term_by_term(rates, betas, eps, root, start, until):
    """P, and S(root) of the module's docstring, one step after the other in Python's floats."""
    beta1, beta2 = betas
    value, moved = 1.0, 0.0
    for step in range(start + 1, until + 1):
        lr, weight_decay = rates[step - 1]
        first, second = beta1 ** (step - start), beta2 ** (step - start)
        denominator = math.sqrt(second) * root / math.sqrt(1 - beta2**step) + eps
        keep = 1 - lr * weight_decay
        value, moved = value * keep, moved * keep + lr / (1 - beta1**step) * first / denominator
    return value, moved


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1e-4, 3e-3, 0.1]), st.sampled_from([0.0, 0.01, 1.0])), min_size=1),
    st.integers(1, 40),
    st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.97, 0.98), (0.99, 0.9999), (0.3, 0.1)]),
    st.sampled_from([1e-30, 1e-8, 1e-2, 10.0]),
    st.floats(0, 1),
)
def test_missed_steps_are_every_step(runs, repeats, betas, eps, where):
    """For any sqrt(v) from 0 to far above eps, in fp64 to a few roundings, in fp32's panels to one of fp32."""
    rates = [rate for rate in runs for _ in range(repeats)]
    history, until = history_of(rates, betas), len(rates)
    assert len(history) <= len(runs)
    start = min(1 + int(where * (until - 1)), until)  # of a row that a step has touched
    roots = torch.tensor([[0.0, 1e-20, 1e-8, 1e-4, 1e-2, 1.0, 1e6]], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        missed = missed_steps(history, torch.tensor([start], dtype=torch.int32), until, dtype)
        if start == until:
            assert missed is None
            continue
        actual = steps_a_moment(roots, missed.panels, eps)[0].tolist()
        allowed = 1e-13 if dtype is torch.float64 else 2**-24
        for root, sum_of_steps in zip(roots[0].tolist(), actual, strict=True):
            value, moved = term_by_term(rates, betas, eps, root, start, until)
            assert missed.decays[0, 0] == pytest.approx(value, rel=1e-12)
            # What is cut off is relative to the largest rate: see the docstring of the module.
            cut = max(lr for lr, _ in rates) * (2**-61 if dtype is torch.float64 else 2**-32) / (root + eps)
            assert abs(sum_of_steps - moved) <= allowed * moved + cut
        assert missed.decays[0, 1] == pytest.approx(betas[0] ** (until - start), rel=1e-12, abs=1e-290)
        assert missed.decays[0, 2] == pytest.approx(betas[1] ** (until - start), rel=1e-12)


def test_the_documented_numbers():
    history = history_of([(1e-3, 0.01)])
    assert [_terms(history, dtype) for dtype in (torch.float32, torch.float64)] == [234, 426]
    assert 16.0 ** -moments_of(torch.float32) < 2**-24 and 16.0 ** -moments_of(torch.float64) < 2**-53

    def panels(start, dtype):
        args = (torch.tensor([start]), start + 1000, _terms(history, dtype), moments_of(dtype))
        return operator("skipped_steps")(history.entries, *args)[1].shape[1]

    assert panels(0, torch.float32) == 23 and panels(0, torch.float64) == 26
    assert panels(20_000, torch.float32) == 1 and panels(20_000, torch.float64) == 2


def test_what_many_rows_missed_is_each_their_own(monkeypatch):
    """It does not depend on what other rows missed, nor on how many rows are asked for at once."""
    history = history_of([(1e-3 * (1 + step % 5), 0.01) for step in range(400)])
    last = torch.arange(0, 400, 7, dtype=torch.int32)
    together = missed_steps(history, last, 400, torch.float32)
    monkeypatch.setattr("memcompile.lowering.update.skipped_steps._STARTS", 5)
    in_parts = missed_steps(history, last, 400, torch.float32)
    roots = torch.rand(len(last), 6, dtype=torch.float64)
    moved = steps_a_moment(roots, together.panels, 1e-3)
    assert torch.equal(steps_a_moment(roots, in_parts.panels, 1e-3), moved)
    for i, start in enumerate(last):
        alone = missed_steps(history, start[None], 400, torch.float32)
        assert torch.equal(steps_a_moment(roots[i : i + 1], alone.panels, 1e-3)[0], moved[i])
        assert torch.equal(alone.decays[0], together.decays[i])


def test_moments_of_zero_move_nothing():
    missed = missed_steps(
        history_of([(1e-3, 0.1)] * 50), torch.tensor([0, 20, 0], dtype=torch.int32), 50, torch.float32
    )
    moments = missed.panels[missed.entries, :, 1:]
    assert not moments[[0, 2]].any() and moments[1].any()
    assert missed.decays[missed.entries, 1:][[0, 2]].eq(1).all(), "row_adam need not read them"
    decays = missed.decays[missed.entries, 0]
    assert decays.tolist() == pytest.approx([(1 - 1e-4) ** 50, (1 - 1e-4) ** 30, (1 - 1e-4) ** 50])


def test_rows_that_are_up_to_date_have_missed_nothing():
    history = history_of([(1e-3, 0.01)] * 3)
    assert missed_steps(history, torch.tensor([3, 3], dtype=torch.int32), 3, torch.float32) is None
    assert missed_steps(history, torch.tensor([], dtype=torch.int32), 3, torch.float32) is None
    untouched = torch.zeros(2, dtype=torch.int32)
    assert missed_steps(history, untouched, 0, torch.float32) is None
    assert missed_steps(history, untouched, 3, torch.float32).panels.shape[1] == 0, "they miss their decay alone"
    both = missed_steps(history, torch.tensor([3, 1], dtype=torch.int32), 3, torch.float32)
    up_to_date = both.entries[0]
    assert both.decays[up_to_date].tolist() == [1, 1, 1] and not both.panels[up_to_date, :, 1:].any()
