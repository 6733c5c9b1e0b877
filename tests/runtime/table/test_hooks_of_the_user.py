"""The user's own hooks around a step, and optimizers whose step runs another: one step, and gradients that are seen."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import memcompile
from memcompile.errors import PlanError
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch, planned_gpt
from tests.runtime.table.stepping import assert_as_dense, stepped_by_pytorch, train


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


WHEN = ("before plan()", "after plan()", "after the first step", "of all optimizers")


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("when", WHEN)
def test_a_hook_sees_what_it_sees_of_a_dense_training(when, values_grad):
    """The values, their gradient, groups and counts, before and after each step, whenever it was registered."""

    def training(values_grad: str) -> list:
        torch.manual_seed(0)
        model, seen = tiny_gpt(layers=1).double(), []

        def note(optimizer: Optimizer, *_: object) -> None:
            gradient, names = model.memory_values.grad, [sorted(group) for group in optimizer.param_groups]
            count = int(optimizer.state.get(model.head.weight, {}).get("step", 0))
            numbers = [model.state_dict()["memory_values"].clone(), gradient.to_dense().clone()]
            seen.append((numbers, [len(g["params"]) for g in optimizer.param_groups], names, count))

        def register(optimizer: Optimizer) -> list:
            if when == "of all optimizers":
                return [register_optimizer_step_pre_hook(note), register_optimizer_step_post_hook(note)]
            return [optimizer.register_step_pre_hook(note), optimizer.register_step_post_hook(note)]

        optimizer = AdamW(model.parameters(), lr=1e-2) if when == "before plan()" else None
        handles = register(optimizer) if optimizer is not None else []
        memcompile.plan(model, memory_layers=1, values_grad=values_grad, values_lr=None, **MEMORY)
        optimizer = optimizer or AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            if not handles and (when != "after the first step" or step):
                handles = register(optimizer)
            optimizer.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()
        for handle in handles:
            handle.remove()
        return seen

    actual = training(values_grad)
    with stepped_by_pytorch():
        expected = training("dense")
    assert len(actual) == (4 if when == "after the first step" else 6)
    assert [rest for _, *rest in actual] == [rest for _, *rest in expected]
    torch.testing.assert_close([n for n, *_ in actual], [n for n, *_ in expected], rtol=0, atol=1e-10)


class ClipsAndAverages(AdamW):
    """Changes gradients before its parent's step, and reads the parameters after it."""

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        nn.utils.clip_grad_value_(parameters, 1e-4)
        result = super().step(closure)
        self.moved = [p.grad is not None for p in parameters]
        return result


def test_a_subclass_sees_gradients_around_its_parents_step():
    def training(model: nn.Module) -> nn.Module:
        optimizer = ClipsAndAverages(model.parameters(), lr=1e-2, betas=(0.5, 0.6), eps=1e-3)
        train(model, optimizer, range(3))
        assert all(optimizer.moved)
        return model

    assert_as_dense(training)


class ByHelper(AdamW):
    """Its step does not name its parent's."""

    def step(self, closure=None):
        return self._helper(closure)

    def _helper(self, closure):
        return super().step(closure)


class ClearsItself(SGD):
    zeros = False

    def step(self, closure=None):
        result = super().step(closure)
        self.zero_grad(set_to_none=not self.zeros)
        return result


class ClearsInside(Optimizer):
    def __init__(self, params, lr, set_to_none):
        super().__init__(params, {"lr": lr})
        self.set_to_none = set_to_none

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
        self.zero_grad(set_to_none=self.set_to_none)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_clears_gradients_clears_that_of_the_table(set_to_none):
    """Otherwise the next backward would add to it."""
    model = planned_gpt(values_grad="sparse", values_optimizer="row_sgd", values_lr=1e-2).double()
    optimizer, values = ClearsInside(model.parameters(), 1e-2, set_to_none), model.memory_values
    for step in range(2):
        model(*batch(step)).backward()
        gradient, before = values.grad.to_dense(), values.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - values.detach(), 1e-2 * gradient, rtol=0, atol=1e-12)
        assert values.grad is None if set_to_none else not values.grad.to_dense().any()


@pytest.mark.parametrize("make", [ByHelper, ClearsItself])
def test_other_ways_to_call_a_parent(make):
    assert_as_dense(lambda model: train(model, make(model.parameters(), lr=1e-2), range(3)))


class InAClosure(Optimizer):
    """Steps an optimizer that is no attribute of it."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.run = lambda: inner.step()

    def step(self, closure=None):
        self.run()


def test_an_optimizer_that_hides_the_one_inside_of_it():
    def training(model: nn.Module) -> nn.Module:
        return train(model, InAClosure(AdamW(model.parameters(), lr=1e-2, betas=(0.5, 0.6))), range(3))

    assert_as_dense(training)


def test_a_class_whose_step_was_replaced_is_told_before_anything_moves(monkeypatch):
    class Replaced(SGD):
        pass

    model = planned_gpt()
    optimizer = Replaced(model.parameters(), lr=0.1)
    hidden = Replaced.step
    monkeypatch.setattr(Replaced, "step", lambda self, closure=None: hidden(self, closure))
    model(*batch()).backward()
    before = model.head.weight.detach().clone()
    with pytest.raises(PlanError, match=r"Replaced.step was replaced .* decorate that function with functools.wraps"):
        optimizer.step()
    assert torch.equal(model.head.weight, before)
