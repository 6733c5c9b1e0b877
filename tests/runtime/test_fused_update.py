"""values_grad="fused": the same training as with a gradient, none kept, and what it cannot serve is refused."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memcompile import OptionError
from memcompile.runtime.optim import RowAdamW
from memcompile.runtime.pool import pool_of
from tests.planned import batch, plain_attention, planned_gpt

PLAN = {"layers": 4, "memory_layers": 3, "n_keys": 32}


def fused_model() -> torch.nn.Module:
    return planned_gpt(**PLAN, values_grad="fused").double()


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("compiled", [False, True])
@plain_attention()
def test_three_layers_that_share_a_table_train_as_with_a_dense_gradient(compiled):
    results = []
    for gradient in ("dense", "fused"):
        model = planned_gpt(**PLAN, values_grad=gradient).double()
        run = torch.compile(model, backend="memcompile") if compiled and gradient == "fused" else model
        optimizer = adamw(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        for step in range(8):
            optimizer.zero_grad()
            run(*batch(step)).backward()
            assert (model.memory_values.grad is None) == (gradient == "fused")
            optimizer.step()
            schedule.step()
        results.append({name: p.clone() for name, p in model.state_dict().items() if p.is_floating_point()})
    for name, parameter in results[0].items():
        torch.testing.assert_close(results[1][name], parameter, rtol=0, atol=1e-10)


def test_accumulation_is_refused_before_it_changes_anything():
    model = fused_model()
    optimizer = adamw(model)
    model(*batch(0)).backward()
    before = model.memory_values.detach().clone()
    loss = model(*batch(1))
    with pytest.raises(OptionError, match=r"cannot accumulate gradients.*Use values_grad='sparse'"):
        loss.backward()
    assert torch.equal(model.memory_values, before)
    optimizer.zero_grad()  # the refused backward had begun to add to others
    optimizer.step()
    model(*batch(1)).backward()  # after the step all is as ever
    assert not torch.equal(model.memory_values, before)


def clip(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def penalty(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.head.weight.pow(2).sum().backward()


@pytest.mark.parametrize("change", [clip, penalty])
def test_gradients_that_are_changed_before_the_step_are_refused(change):
    model = fused_model()
    optimizer = adamw(model)
    model(*batch(0)).backward()
    change(model, optimizer)
    before = model.head.weight.detach().clone()
    with pytest.raises(OptionError, match="were changed between the backward and the optimizer's step"):
        optimizer.step()
    assert torch.equal(model.head.weight, before)


def test_a_grad_scaler_is_refused():
    model = fused_model()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu")
    loss = scaler.scale(model(*batch(0)))
    before = model.memory_values.detach().clone()
    with pytest.raises(OptionError, match="GradScaler"):
        loss.backward()
    assert torch.equal(model.memory_values, before) and optimizer.param_groups
    del scaler
    gc.collect()


def test_checkpointing_is_refused():
    model = fused_model()
    optimizer = adamw(model)
    loss = checkpoint(model, *batch(0), use_reentrant=False)
    with pytest.raises(RuntimeError, match="cannot serve activation checkpointing"):
        loss.backward()
    assert optimizer.param_groups


def test_an_optimizer_must_hold_the_values():
    model = fused_model()
    with pytest.raises(RuntimeError, match=r"build one from model.parameters\(\) before the first backward"):
        model(*batch(0)).backward()


def test_an_optimizer_of_rows_of_the_users_own_is_refused():
    model = fused_model()
    optimizer = RowAdamW([model.memory_values])
    with pytest.raises(OptionError, match="RowAdamW was given them itself"):
        model(*batch(0)).backward()
    assert optimizer.param_groups


def test_a_backward_that_raised_leaves_nothing_behind():
    model = fused_model()
    optimizer = adamw(model)
    layer = next(iter(pool_of(model).layers.values()))
    hook = layer.out_weight.register_hook(lambda grad: 1 / 0)  # of the first layer: the others are through
    with pytest.raises(ZeroDivisionError):
        model(*batch(0)).backward()
    hook.remove()
    optimizer.zero_grad()
    model(*batch(1)).backward()
    optimizer.step()
    other = fused_model()
    other_optimizer = adamw(other)
    other(*batch(1)).backward()
    other_optimizer.step()
    assert torch.equal(model.memory_values, other.memory_values)


def test_clipping_what_another_optimizer_steps_is_refused():
    model = fused_model()
    rest = [p for p in model.parameters() if p is not model.memory_values]
    optimizers = torch.optim.AdamW(rest), torch.optim.AdamW([model.memory_values])
    model(*batch(0)).backward()
    torch.nn.utils.clip_grad_norm_(rest, 1e-4)
    with pytest.raises(OptionError, match="were changed between"):
        optimizers[1].step()


def test_another_optimizer_that_steps_is_refused():
    model = fused_model()
    first = adamw(model)
    model(*batch(0)).backward()
    first.step()
    second = adamw(model)
    model(*batch(1)).backward()
    with pytest.raises(OptionError, match="by another optimizer than the one that steps now"):
        second.step()


def test_two_optimizers_that_hold_the_values_are_refused():
    model = fused_model()
    optimizers = adamw(model), adamw(model)
    with pytest.raises(OptionError, match="does not know by which of the optimizers that hold them: AdamW, AdamW"):
        model(*batch(0)).backward()
    assert len(optimizers) == 2


def test_a_gradient_that_is_asked_for_is_refused():
    model = fused_model()
    optimizer = adamw(model)
    with pytest.raises(OptionError, match="makes no gradient of the values"):
        torch.autograd.grad(model(*batch(0)), model.memory_values)
    model(*batch(1)).backward()
    optimizer.step()
