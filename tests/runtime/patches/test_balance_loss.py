"""A balance loss and `GradScaler`, which would divide its gradient away: refused before anything changes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from memcompile import OptionError
from tests.planned import assert_same, batch, planned_gpt

SCALER = torch.amp.GradScaler


def of_memory(model):
    return [p for name, p in model.named_parameters() if "memory" in name]


def of_the_rest(model):
    """Which the gradient of the balance loss reaches too."""
    return [p for name, p in model.named_parameters() if "memory" not in name]


def state_of(model):
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    return tensors | {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "call"), [(SCALER, "unscale_"), (SCALER, "step"), (ShardedGradScaler, "step")])
@pytest.mark.parametrize(
    ("optimizer", "held"),
    [(lambda p: torch.optim.SGD(p, lr=0.1), of_memory), (lambda p: torch.optim.AdamW(p, fused=True), of_the_rest)],
    ids=["of the memory", "fused, of the rest"],
)
def test_an_enabled_scaler_is_refused(kind, call, optimizer, held):
    model = planned_gpt(layers=1, memory_layers=1, balance_loss=0.5)
    scaler = kind("cpu", init_scale=4.0)
    scaler.scale(model(*batch())).backward()
    before = state_of(model)
    with pytest.raises(OptionError, match=r"balance_loss=0\.5: GradScaler divides .*GradScaler\(enabled=False\)"):
        getattr(scaler, call)(optimizer(held(model)))
    assert_same(state_of(model), before)


def test_what_loses_nothing_is_served():
    """A scaler that is off, and one of a model without the loss beside one that has it."""
    model, plain = (planned_gpt(layers=1, memory_layers=1, balance_loss=factor) for factor in (0.5, 0.0))
    for each, scaler in ((model, SCALER("cpu", enabled=False)), (plain, SCALER("cpu", init_scale=4.0))):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        before = each.head.weight.detach().clone()
        scaler.scale(each(*batch())).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(each.head.weight, before - 0.1 * each.head.weight.grad)
        assert not torch.equal(each.head.weight, before)


def test_nothing_is_asked_once_the_models_are_gone():
    gc.collect()
    before = SCALER.step
    model = planned_gpt(layers=1, memory_layers=1, balance_loss=0.5)
    assert SCALER.step is not before
    del model
    gc.collect()
    assert SCALER.step is before
