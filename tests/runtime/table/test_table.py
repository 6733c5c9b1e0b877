"""The table in a training: it learns as PyTorch's optimizers would have it, whatever happens around a step."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam
from torch.optim import lr_scheduler as schedulers

from memcompile.errors import OptionError
from memcompile.runtime.optim import LazyAdam, RowAdamW, RowSGD, RowwiseAdagrad
from memcompile.runtime.table import which_rule
from tests.planned import assert_same, batch, planned_gpt
from tests.runtime.table.stepping import (
    adamw,
    assert_as_dense,
    evaluate,
    is_oracle,
    model_of,
    snapshot,
    stepped_by_pytorch,
    train,
)


def test_a_training_that_raises_ends_as_every_program_does():
    """The interpreter frees the traceback last, and with it the optimizer before the model."""
    program = """
        from tests.runtime.table.stepping import adamw, model_of, train

        def main():
            model = model_of("sparse")
            optimizer = adamw(model)
            train(model, optimizer, range(3))
            raise ZeroDivisionError

        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("ZeroDivisionError\n")


# --- who steps ----------------------------------------------------------------------------------------------------


# An optimizer, its options, and what steps the values in a training of PyTorch: itself, or another.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "AdamW": (AdamW, {}, AdamW),
    "fused AdamW": (AdamW, {"fused": True}, AdamW),
    "foreach AdamW": (AdamW, {"foreach": True, "maximize": True}, functools.partial(AdamW, maximize=True)),
    "Adam": (Adam, {}, Adam),
    "SGD": (SGD, {"weight_decay": 0.1}, functools.partial(SGD, weight_decay=0.1)),
    "Adam with coupled weight decay": (Adam, {"weight_decay": 0.1}, functools.partial(AdamW, weight_decay=0.1)),
    "AMSGrad": (AdamW, {"amsgrad": True}, AdamW),
    "SGD with momentum": (SGD, {"momentum": 0.9}, functools.partial(AdamW, weight_decay=0.0)),
    "RMSprop": (torch.optim.RMSprop, {"eps": 1e-3}, functools.partial(AdamW, weight_decay=0.0)),
    "Adagrad": (Adagrad, {"eps": 1e-6}, functools.partial(RowwiseAdagrad, eps=1e-6)),
    "Adagrad with weight decay": (
        Adagrad,
        {"eps": 1e-6, "weight_decay": 0.1},
        functools.partial(RowwiseAdagrad, eps=1e-6, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("values_lr", [None, 2e-3])
@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_pytorchs(name, values_grad, values_lr):
    """The oracle holds the values in an optimizer of their own, at their own rate. Gradients may be dense: the rule is
    the same.
    """
    make, options, of_values = OPTIMIZERS[name]
    model = model_of(values_grad, values_lr=values_lr)
    optimizers: list[Optimizer] = [make(model.parameters(), lr=1e-2, **options)]
    schedules = [schedulers.LambdaLR(optimizers[0], lambda step: 0.8**step)]
    with stepped_by_pytorch():
        # Row-wise Adagrad leaves rows without a gradient as they are, with weight decay too.
        oracle = model_of(values_grad if make is Adagrad else "dense", values_lr=values_lr)
    values, rest = of_values([oracle.memory_values], lr=1e-2 if values_lr is None else values_lr), rest_of(oracle)
    theirs = [make([p for _, p in rest], lr=1e-2, **options), values]
    schedules.append(schedulers.LambdaLR(theirs[0], lambda step: 0.8**step))
    if values_lr is None:
        schedules.append(schedulers.LambdaLR(values, lambda step: 0.8**step))
    for step in range(5):
        for trained, steppers in ((model, optimizers), (oracle, theirs)):
            trained.zero_grad()
            trained(*batch(step)).backward()
            for stepper in steppers:
                stepper.step()
        for schedule in schedules:
            schedule.step()
    # A gradient that is zero but for rounding, 1e-17, counts for 1e-17 / eps in Adam.
    torch.testing.assert_close(snapshot(model), snapshot(oracle), rtol=0, atol=1e-10)


def rest_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if name != "memory_values"]


def test_options_that_rows_are_not_stepped_with_are_refused_before_anything_moves():
    model = model_of("sparse")
    optimizer = AdamW(model.parameters(), betas=(0.95, 0.9))
    before = snapshot(model)
    model(*batch()).backward()
    with pytest.raises(OptionError, match=r"values in AdamW, by row_adamw: betas: expected beta1\*\*2 < beta2"):
        optimizer.step()
    assert_same(snapshot(model), before)
    assert model.memory_values.grad is not None and not optimizer.state


def test_sparse_adam_for_the_values_beside_another_optimizer():
    model = model_of("sparse")
    values = SparseAdam([model.memory_values], lr=1.0)
    rest = AdamW([p for name, p in model.named_parameters() if name != "memory_values"])
    model(*batch()).backward()
    before = model.memory_values.detach().clone()
    values.step()
    rest.step()
    touched = model.memory_values.grad.indices()[0]
    moved = (before - model.memory_values.detach()).abs().amax(1).nonzero()[:, 0]
    assert set(moved.tolist()) <= set(touched.tolist())
    assert 0 < (before - model.memory_values).abs().max() <= 1.01e-3  # values_lr


@pytest.mark.parametrize(
    ("name", "kind"),
    [("row_adamw", RowAdamW), ("lazy_adam", LazyAdam), ("row_wise_adagrad", RowwiseAdagrad), ("row_sgd", RowSGD)],
)
def test_a_chosen_optimizer_steps_as_it_does_alone_and_resumes_bit_for_bit(name, kind):
    model = model_of("sparse", values_optimizer=name, values_lr=None)
    twin = nn.Parameter(model.memory_values.detach().clone())
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    alone = kind([twin], lr=0.1, weight_decay=0.01)
    for step in range(3):
        train(model, optimizer, [step])
        twin.grad = model.memory_values.grad.clone()
        alone.step()
    alone.flush(twin)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))  # with the rows up to date
    assert torch.equal(model.memory_values, twin)

    resumed = model_of("sparse", values_optimizer=name, values_lr=None, seed=1)
    other = SGD(resumed.parameters(), lr=0.1, weight_decay=0.01)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert_same(snapshot(train(resumed, other, range(3, 6))), snapshot(train(model, optimizer, range(3, 6))))


def test_the_log_says_once_who_steps(caplog):
    which_rule._say.cache_clear()
    with caplog.at_level(logging.INFO, "memcompile"):
        model = model_of("sparse")
        caplog.clear()
        train(model, adamw(model), range(3))
        other = torch.optim.RMSprop(model.parameters())
        train(model, other, range(2))
        train(model, other, range(2))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "memcompile: AdamW.step() steps the table of values by rows, by the rule 'row_adamw'"),
        (
            "WARNING",
            "memcompile: RMSprop.step() steps the table of values by rows, by the rule 'row_adamw', which is not the "
            "rule of RMSprop (values_optimizer=... chooses another)",
        ),
    ]


def test_options_that_change_in_mid_training():
    """Betas, eps and weight decay are those of the step."""

    def training(model: nn.Module) -> nn.Module:
        optimizer = AdamW(model.parameters(), lr=1e-2)
        for changed in ({}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}, {"weight_decay": 0.0}):
            optimizer.param_groups[0].update(changed)
            train(model, optimizer, range(3))
        return model

    assert_as_dense(training)


def test_optimizers_that_take_turns():
    """Each has a state of its own."""

    def training(model: nn.Module) -> nn.Module:
        turns = [adamw(model), SGD(model.parameters(), lr=0.1, weight_decay=0.1), adamw(model, lr=1e-3)]
        for step in range(9):
            train(model, turns[step % 3], [step])
        assert [optimizer.state[model.memory_values].get("step") for optimizer in turns[::2]] == [3, 3]
        return model

    assert_as_dense(training)


def test_the_users_own_row_optimizer():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        if not is_oracle(model):
            optimizer = RowAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        train(model, optimizer, range(3))
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        evaluate(model)
        return train(model, adamw(model), range(3, 5))

    assert_as_dense(training)


# --- groups, rates, closures --------------------------------------------------------------------------------------


def test_values_in_a_group_of_their_own_and_named_parameters():
    def training(model: nn.Module) -> nn.Module:
        rest = [(name, p) for name, p in model.named_parameters() if name != "memory_values"]
        own = [("memory_values", model.memory_values)]
        optimizer = AdamW([{"params": own, "weight_decay": 0.3}, {"params": rest}], lr=1e-2, fused=True)
        train(model, optimizer, range(3))
        assert optimizer.param_groups[0]["param_names"] == ["memory_values"]
        optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.0)
        train(model, optimizer, range(3, 5))
        optimizer.param_groups[0].update(params=[], param_names=[])
        optimizer.add_param_group({"params": own, "betas": (0.5, 0.9)})
        return train(model, optimizer, range(5, 7))

    assert_as_dense(training, values_lr=None)


@pytest.mark.parametrize("values_lr", [None, 2e-3])
def test_a_rate_in_a_tensor(values_lr):
    assert_as_dense(
        lambda model: train(model, adamw(model, lr=torch.tensor(0.01, dtype=torch.float64)), range(4)),
        values_lr=values_lr,
    )


def test_closures_and_steps_that_raise():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(*batch(seen.append(0) or len(seen)))
            loss.backward()
            if len(seen) == 3:
                raise ValueError
            return loss

        seen: list[int] = []
        for _ in range(5):
            try:
                assert optimizer.step(closure) is not None
            except ValueError:
                assert len(seen) == 3
        return model

    assert_as_dense(training)


def test_an_optimizer_for_each_parameter_that_steps_in_the_backward():
    def training(model: nn.Module) -> nn.Module:
        optimizers = {p: AdamW([p], lr=1e-2) for p in model.parameters()}

        def step(parameter: Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(4):
            model(*batch(seed)).backward()
        return model

    assert_as_dense(training)


def test_values_that_are_frozen_and_thawed():
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        for frozen in (False, True, False):
            model.memory_values.requires_grad_(not frozen)
            train(model, optimizer, range(3))
        return model

    assert_as_dense(training)


def test_steps_without_a_backward_and_both_ways_to_zero():
    """A gradient of zeros is a step of momentum, one of None is none."""

    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        for step in range(8):
            optimizer.zero_grad(set_to_none=step in (4, 5))
            if step not in (2, 5):
                model(*batch(step)).backward()
            optimizer.step()
        return model

    assert_as_dense(training)


def test_an_optimizer_step_inside_torch_compile():
    model, twin = (model_of("sparse") for _ in range(2))
    optimizer, other = (SGD([m.memory_values, m.head.weight], lr=0.1) for m in (model, twin))
    gc.collect()  # models of other tests, that Dynamo would see disappear
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for each, call in ((model, step), (twin, other.step)):
        each(*batch()).backward()
        call()
    torch.testing.assert_close(snapshot(model), snapshot(twin))
    assert optimizer.state[model.memory_values]["step"] == other.state[twin.memory_values]["step"] == 1


# --- scaling and clipping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_grad_scaler_and_clipping(fused, clip):
    def training(model: nn.Module) -> nn.Module:
        optimizer, scaler = adamw(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(5):
            optimizer.zero_grad()
            overflow = float("inf") if step == 2 else 1.0
            scaler.scale(overflow * model(*batch(step))).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            if clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            before = model.memory_values.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model.memory_values) == (step == 2)
        assert scaler.get_scale() == 4.0
        return model

    assert_as_dense(training)


# --- optimizers and dtypes that have no rule --------------------------------------------------------------------------


@pytest.mark.parametrize("build", [torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("name", ["row_adamw", "row_wise_adagrad"])
def test_any_optimizer_may_have_its_values_stepped_by_rows(build, name):
    """Options of the same name that mean something else, and state that it began with, are not taken over."""
    model = planned_gpt(values_grad="sparse", values_optimizer=name, n_keys=16)
    optimizer = build(model.parameters(), lr=1e-3)
    before = model.state_dict()["memory_values"].clone()
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()
    moved = (model.state_dict()["memory_values"] - before).abs()
    assert 0 < moved.max() < 0.1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model(*batch(3)).backward()
    optimizer.step()


def test_halved_after_training():
    """fp16 is not stepped by rows: what they missed is made up for in fp32, and the gradient is dense from then on."""
    model, twin = (planned_gpt(values_grad=gradient, n_keys=16) for gradient in ("sparse", "dense"))
    for each in (model, twin):  # at values_lr, both through the table
        optimizer = AdamW(each.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(4):
            optimizer.zero_grad()
            each(*batch(step)).backward()
            optimizer.step()
        each.half()
    torch.testing.assert_close(model.state_dict()["memory_values"], twin.memory_values.detach(), rtol=2**-9, atol=1e-6)
    assert model.half()(*batch(9)).isfinite()
