"""The plans of skipped steps: the operator against the PyTorch operators, `opcheck`, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.lowering import operator
from memcompile.lowering.update import skipped_steps
from memcompile.lowering.update.missed_steps import factors_of_step
from memcompile.lowering.update.rate_history import RateHistory
from memcompile.lowering.update.row_adam import steps_a_moment

BETAS = [(0.9, 0.999), (0.97, 0.98), (0.3, 0.1), (0.85, 0.99), (0.0, 0.9), (0.95, 0.9999)]


def history_of(steps, betas, change, seed=0):
    """Rates that change now and then, betas after every `change` steps."""
    generator = torch.Generator().manual_seed(seed)
    lrs = (10 ** -(4 * torch.rand(steps, generator=generator))).tolist()
    history = RateHistory.new(0)
    for step in range(steps):
        lr = lrs[step // 7 * 7]
        history.record(lr, factors_of_step(lr, 0.01, betas[step // change % len(betas)]))
    return history


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 400),
    betas=st.lists(st.sampled_from(BETAS), min_size=1, max_size=3),
    change=st.integers(1, 200),
    terms=st.sampled_from([1, 40, 234, 500]),
    moments=st.sampled_from([7, 14]),
    seed=st.integers(0, 2**32),
)
def test_against_the_operators_of_pytorch(steps, betas, change, terms, moments, seed):
    """They may divide into panels otherwise, where a term lies on the border: what counts is what rows do."""
    history = history_of(steps, betas, change, seed)
    chosen = torch.rand(steps + 2, generator=torch.Generator().manual_seed(seed)) < 0.2
    starts = chosen.nonzero()[:, 0] - 1
    args = (history.entries, starts, steps, terms, moments)
    assert_alike(operator("skipped_steps")(*args), skipped_steps._kernel(*args))


def assert_alike(actual, expected):
    (decays, panels), (plain_decays, plain) = actual, expected
    torch.testing.assert_close(decays, plain_decays, rtol=1e-11, atol=0)
    assert panels.shape[::2] == plain.shape[::2]
    roots = torch.tensor([0.0, 1e-20, 1e-8, 1e-4, 1e-2, 1.0, 1e6], dtype=torch.float64).expand(len(decays), -1)
    moved, expected = (steps_a_moment(roots, p, 1e-8) for p in (panels, plain))
    torch.testing.assert_close(moved, expected, rtol=3e-8 if panels.shape[2] == 8 else 1e-10, atol=1e-280)


def test_many_steps_and_threads():
    """Past what one thread takes; as the operators of PyTorch have them, whatever the number of threads."""
    history = history_of(3000, BETAS[:1], 1)
    starts = torch.arange(-1, 3001, 2)
    args = (history.entries, starts, 3000, 234, 7)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(operator("skipped_steps")(*args))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))
    assert_alike(results[0], skipped_steps._kernel(*args))


def test_opcheck():
    args = (history_of(50, BETAS[:2], 20).entries, torch.tensor([-1, 3, 50]), 50, 20, 7)
    torch.library.opcheck(operator("skipped_steps"), args)
    args[0].requires_grad_()
    torch.library.opcheck(operator("skipped_steps"), args)


def test_refusals():
    rates, starts = history_of(5, BETAS[:1], 1).entries, torch.tensor([-1, 3])
    for args, message in (
        ((rates.float(), starts, 5, 20, 7), "rates"),
        ((rates[:, 1:], starts, 5, 20, 7), "rates"),
        ((rates, starts.int(), 5, 20, 7), "starts"),
        ((rates, starts, 2, 20, 7), "starts"),
        ((rates, starts.flip(0), 5, 20, 7), "starts"),
        ((rates, starts - 1, 5, 20, 7), "starts"),
        ((rates, starts, 5, 0, 7), "terms"),
        ((rates, starts, 5, 20, 8), "moments"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            operator("skipped_steps")(*args)
