"""RateHistory: one tensor with an entry for each change of the rates, and what products of factors it tells."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcompile.lowering.update.rate_history import (
    BETA1,
    BETA2,
    COLUMNS,
    DECAY,
    LOGS,
    LR,
    RateHistory,
    located,
    log_product,
)

RATES = st.tuples(st.sampled_from([0.0, 1e-4, 0.1]), st.sampled_from([0.0, 0.01]), st.sampled_from([0.9, 0.5]))
RUNS = st.lists(st.tuples(RATES, st.integers(1, 30)), min_size=1, max_size=20)


def logs_of(lr, weight_decay, beta):
    return [math.log1p(-lr * weight_decay), math.log(beta), 2 * math.log(beta)]


def history_of(steps, before=0, eps=0.0):
    history = RateHistory.new(before, eps)
    for lr, weight_decay, beta in steps:
        history.record(lr, logs_of(lr, weight_decay, beta))
    return history


@settings(max_examples=40, deadline=None)
@given(RUNS, st.integers(0, 10**6), st.data())
def test_products_are_those_of_every_step(runs, before, data):
    steps = [rates for rates, repeats in runs for _ in range(repeats)]
    history = history_of(steps, before)
    assert history.step == before + len(steps)
    seen = [(rates[0], logs_of(*rates)) for rates in steps]
    assert len(history) == sum(i == 0 or seen[i] != seen[i - 1] for i in range(len(seen)))
    after, until = sorted(data.draw(st.tuples(*[st.integers(0, len(steps))] * 2)))
    entries = history.entries
    ends = [located(entries, torch.tensor([before + end])) for end in (after, until)]
    for factor in (DECAY, BETA1, BETA2):
        exact = math.fsum(logs_of(*rates)[factor] for rates in steps[after:until])
        assert float(log_product(entries, factor, *ends)) == pytest.approx(exact, rel=1e-9, abs=1e-12)
    some = torch.arange(before + 1, before + len(steps) + 1)
    rates_of = entries[located(entries, some)[1]]
    assert rates_of[:, LR].tolist() == [rates[0] for rates in steps]
    assert rates_of[:, LOGS + 2 * BETA1].tolist() == [math.log(rates[2]) for rates in steps]


def test_one_tensor_holds_all_of_it():
    """What views it, or loads it, goes on as the history itself."""
    history = history_of([(0.1, 0.01, 0.9)] * 3 + [(0.2, 0.01, 0.9)] * 2, before=7, eps=1e-6)
    assert history.tensor.dtype is torch.float64 and history.tensor.shape[1] == COLUMNS
    same = RateHistory(history.tensor.clone())
    assert (same.step, len(same), same.eps) == (12, 2, 1e-6)
    assert torch.equal(same.entries, history.entries)
    for each in (history, same):
        each.record(0.3, logs_of(0.3, 0.0, 0.9))
    assert torch.equal(same.tensor, history.tensor) and same.entries[:, 0].tolist() == [8, 11, 13]


def test_it_grows_by_doubling_and_starts_again():
    history, sizes = RateHistory.new(0, 1e-3), set()
    for step in range(1, 101):
        history.record(1e-3 * step, logs_of(1e-3 * step, 0.01, 0.9))
        assert len(history) == step
        sizes.add(len(history.tensor))
    assert len(sizes) == 5 and max(sizes) < 256, "a step does not copy the history"
    history.forget()
    assert (history.step, len(history), history.eps) == (100, 0, 1e-3)
    assert torch.equal(history.tensor, RateHistory.new(100, 1e-3).tensor)
