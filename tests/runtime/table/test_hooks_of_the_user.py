"""The user's own hooks around a step, and optimizers whose step runs another: one step, and gradients that are seen."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.planned import batch, planned_gpt
from tests.runtime.table.stepping import stepped_by_pytorch


def clipped_by_a_hook(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=1.0)

    def clip(optimizer: Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1e-3)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def cleared_by_a_hook(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: model.zero_grad())
    return optimizer


@pytest.mark.parametrize("build", [clipped_by_a_hook, cleared_by_a_hook])
def test_hooks_of_the_user_see_the_values_in_their_group(build):
    """A hook before the step sees their gradient, and may change it; after the step they have moved."""
    results = []
    for gradient in ("dense", "sparse"):
        with stepped_by_pytorch() if gradient == "dense" else contextlib.nullcontext():
            model = planned_gpt(values_grad=gradient, values_lr=None, n_keys=16).double()
        start, optimizer = model.memory_values.detach().clone(), build(model)
        for step in range(3):
            if build is clipped_by_a_hook:
                optimizer.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()
            if step == 0:  # later than the library's own
                optimizer.register_step_pre_hook(lambda o, *_: None)
        results.append(start - model.state_dict()["memory_values"])
    assert results[0].any()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


def test_hooks_of_all_optimizers_see_one_step():
    model = planned_gpt(values_grad="sparse", n_keys=16)
    optimizer, seen = AdamW(model.parameters()), []
    handle = register_optimizer_step_post_hook(lambda o, *_: seen.append(o))
    model(*batch()).backward()
    optimizer.step()
    handle.remove()
    assert seen == [optimizer]


class Watching(Optimizer):
    """SGD that notes what it sees of a parameter inside its own step."""

    watched: Tensor
    seen: list[Tensor | None]

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.seen.append(self.watched.grad)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad)
        return loss


class CallsItsParent(AdamW):
    def step(self, closure=None):
        return super().step(closure)


class RunsItsClosure(AdamW):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        super().step()
        return loss


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("make", [CallsItsParent, RunsItsClosure])
def test_a_subclass_that_calls_its_parents_step_steps_once(make, closes):
    """PyTorch runs the hooks for both of them."""
    AdamW([nn.Parameter(torch.ones(1))])  # PyTorch wraps the step of a class when the first is built
    models = [planned_gpt(values_grad="sparse", n_keys=16).double() for _ in range(2)]
    optimizers = [kind(model.parameters(), lr=1e-2) for kind, model in zip((make, AdamW), models, strict=True)]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure() -> Tensor:
                optimizer.zero_grad()  # noqa: B023
                loss = model(*batch(step))  # noqa: B023
                loss.backward()
                return loss

            if closes:
                assert optimizer.step(closure) is not None
            else:
                closure()
                optimizer.step()
            assert optimizer.state[model.memory_values]["step"] == step + 1
            assert model.memory_values.grad.is_sparse
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[name], value, rtol=0, atol=1e-12)


def test_hooks_of_the_user_around_a_step_see_the_gradient_and_the_step_does_not():
    model = planned_gpt(values_grad="sparse", n_keys=16)
    optimizer = Watching(model.parameters(), lr=0.1)
    optimizer.watched, optimizer.seen = model.memory_values, []
    around: list[Tensor | None] = []
    note = lambda *_: around.append(model.memory_values.grad)  # noqa: E731
    optimizer.register_step_pre_hook(note)
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(step)).backward()
        gradient = model.memory_values.grad
        assert gradient.is_sparse
        optimizer.step()
        assert optimizer.seen.pop() is None
        assert all(seen is gradient for seen in around), around
        assert len(around) == 1 + 2 * bool(step)
        assert model.memory_values.grad is gradient
        around.clear()
        if step == 0:
            optimizer.register_step_pre_hook(note)  # later than the library's own
            optimizer.register_step_post_hook(note)
