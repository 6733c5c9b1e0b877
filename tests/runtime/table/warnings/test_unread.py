"""A table of which training reads few slots is told, once; one that is read evenly is not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from memcompile.runtime.table.warnings import unread
from tests.planned import batch, planned_gpt

STEPS = 5


@pytest.fixture(autouse=True)
def _early(monkeypatch, caplog):
    monkeypatch.setattr(unread, "STEPS", STEPS)
    with caplog.at_level(logging.WARNING, "memcompile"):
        yield


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == unread.__name__]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2 * STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(*batch()).backward()
        optimizer.step()


@pytest.mark.parametrize("values_grad", ["dense", "sparse"])
@pytest.mark.parametrize("rule", ["row_adamw", "lazy_adam", "row_wise_adagrad"])
def test_few_slots_are_read(rule, values_grad, monkeypatch, caplog):
    model = planned_gpt(n_keys=64, heads=1, top_k=2, values_optimizer=rule, values_grad=values_grad)
    first = model.memory_values.detach().clone()
    shares = []
    real = unread.share_read
    monkeypatch.setattr(unread, "share_read", lambda state: shares.append(real(state)) or shares[-1])
    train(model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0))
    read = (model.memory_values != first).any(1).double().mean().item()
    assert shares == [read] and 0 < read < unread.LEAST
    (told,) = said(caplog)
    keys = next(n for n in range(2, 65) if n**2 >= read * 64**2)
    assert told.startswith(f"memcompile: in 5 steps {100 * read:.1f}% of the 4,096 slots of Transformer.memory_values")
    assert f"(n_keys={keys} has as many as have been read)" in told and "query_norm='batch' or balance_loss" in told


def test_the_queries_of_a_variant_with_batch_norm_are_spread_already(caplog):
    model = planned_gpt(n_keys=64, heads=1, top_k=2, variant="pkm")
    train(model, torch.optim.AdamW(model.parameters()))
    (told,) = said(caplog)
    assert "(balance_loss=0.01)" in told


def test_a_rule_without_moments_and_a_table_that_is_read_tell_nothing(caplog):
    few = planned_gpt(n_keys=64, heads=1, top_k=2, values_optimizer="row_sgd")
    train(few, torch.optim.AdamW(few.parameters()))
    read = planned_gpt(n_keys=4, heads=2, top_k=4)
    train(read, torch.optim.AdamW(read.parameters()))
    assert said(caplog) == []


def test_it_is_told_after_a_resume_too(caplog):
    model = planned_gpt(n_keys=64, heads=1, top_k=2)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, STEPS - 1)
    other = planned_gpt(n_keys=64, heads=1, top_k=2)
    other.load_state_dict(model.state_dict())
    resumed = torch.optim.AdamW(other.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(other, resumed, 1)
    assert len(said(caplog)) == 1


def test_a_sample_of_many_slots(monkeypatch):
    monkeypatch.setattr(unread, "_SAMPLED", 1000)
    moment = torch.zeros(10_000, 3)
    moment[torch.randperm(10_000)[:2000], 1] = 1.0
    assert unread.share_read({"exp_avg_sq": moment}) == pytest.approx(0.2, abs=0.06)
    assert unread.share_read({"exp_avg_sq": moment, "step": 1}) == unread.share_read({"exp_avg_sq": moment})
    assert unread.share_read({"step": 1}) is None
