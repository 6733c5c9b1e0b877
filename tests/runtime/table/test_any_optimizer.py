"""Optimizers of every kind that hold a table: it learns, and none of them ever sees its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer

from memcompile.runtime.table import hooks
from tests.planned import batch
from tests.runtime.table.optimizer_kinds import ScheduleFree
from tests.runtime.table.stepping import model_of, snapshot, stepped_by_pytorch, train

Seen = list[Tensor | None]


class Lion(Optimizer):
    """arXiv 2302.06675."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(group["lr"] * torch.lerp(p.grad, average, beta1).sign())
                    average.lerp_(p.grad, 1 - beta2)


class Lookahead(Optimizer):
    """arXiv 1907.08610, around any optimizer."""

    def __init__(self, base_optimizer: Optimizer, period: int = 2) -> None:
        self.base_optimizer, self.period, self.count = base_optimizer, period, 0
        super().__init__(base_optimizer.param_groups, {})
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.base_optimizer.step()
        self.count += 1
        if self.count % self.period == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Both(Optimizer):
    """Steps two optimizers inside of its own step."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.first, self.second = first, second
        super().__init__([*first.param_groups, *second.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.first.step()
        self.second.step()


def muon(model: nn.Module) -> Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "Adafactor": lambda model: Adafactor(model.parameters(), lr=1e-2),
    "Lion": lambda model: Lion(model.parameters()),
    "ScheduleFree": lambda model: ScheduleFree(model.parameters()),
    "Muon": muon,
    "SGD with momentum": lambda model: SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "AdamW": lambda model: AdamW(model.parameters(), lr=1e-2),
    "LBFGS": lambda model: LBFGS(model.parameters(), lr=0.1, max_iter=2),
    "Rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters()),
}


@pytest.fixture
def gradients_inside(monkeypatch: pytest.MonkeyPatch) -> Callable[[Optimizer, Tensor], Seen]:
    """`watch(optimizer, parameter)` gives the list of the gradients that the parameter has inside of its steps."""

    def watch(optimizer: Optimizer, parameter: Tensor) -> Seen:
        seen: Seen = []

        def step_with_tables(body: Any, stepped: Optimizer, args: Any, kwargs: Any) -> Any:
            def watched(*args: Any, **kwargs: Any) -> Any:
                before = parameter.grad
                result = body(*args, **kwargs)
                if stepped is optimizer:
                    seen.append(before if before is not None else parameter.grad)
                return result

            return original(functools.wraps(body)(watched), stepped, args, kwargs)

        original = hooks.step_with_tables
        monkeypatch.setattr("memcompile.runtime.patches.optimizer_step.step_with_tables", step_with_tables)
        return seen

    return watch


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_table_learns_and_its_gradient_is_not_in_the_step(name, values_grad, gradients_inside):
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    model = model_of(values_grad, values_lr=1e-2)
    optimizer = MAKERS[name](model)
    values, seen, losses = model.memory_values, gradients_inside(optimizer, model.memory_values), []
    start = values.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        assert values.grad.is_sparse == (values_grad == "sparse")
        losses.append(loss.item())
        return loss

    for step in range(4):
        if name == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert seen == [None] * (step + 1)
        assert values.grad.is_sparse == (values_grad == "sparse")
        assert optimizer.state[values]["step"] == step + 1
    moved = (snapshot(model)["memory_values"] - start).abs().amax(1)
    assert (moved[values.grad.to_dense().abs().amax(1) > 0] > 1e-3).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("period", [2, 100])
def test_an_optimizer_around_another(period):
    """The inner one holds the table, and steps it once; the outer one reads the values itself."""
    results = []
    for values_grad in ("sparse", "dense"):
        model = model_of(values_grad, values_lr=1e-2)
        base = AdamW(model.parameters(), lr=1e-2)
        train(model, Lookahead(base, period), range(5))
        assert base.state[model.memory_values]["step"] == 5
        results.append(snapshot(model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_an_optimizer_that_steps_two_others():
    results = []
    for inside in (True, False):
        model = model_of("sparse", values_lr=1e-2)
        matrices = AdamW([p for p in model.parameters() if p.dim() > 1], lr=1e-2)
        vectors = SGD([p for p in model.parameters() if p.dim() <= 1], lr=1e-2)
        both = Both(matrices, vectors)
        for step in range(4):
            model.zero_grad()
            model(*batch(step)).backward()
            for optimizer in (both,) if inside else (matrices, vectors):
                optimizer.step()
            assert matrices.state[model.memory_values]["step"] == step + 1
            assert model.memory_values.grad.is_sparse
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_steps_in_two_parts_as_of_sam():
    """Sharpness-aware minimization, arXiv 2010.01412: the values are moved by hand, and back, before a step."""

    def training(model: nn.Module) -> dict[str, Tensor]:
        base = AdamW(model.parameters(), lr=1e-2)
        for step in range(4):
            base.zero_grad()
            model(*batch(step)).backward()
            before = {p: p.detach().clone() for p in model.parameters() if p is not model.memory_values}
            with torch.no_grad():
                for p in before:
                    p.add_(0.01 * p.grad)
            base.zero_grad()
            model(*batch(step)).backward()
            with torch.no_grad():
                for p, value in before.items():
                    p.copy_(value)
            base.step()
        return snapshot(model)

    sparse = training(model_of("sparse", values_lr=None))
    with stepped_by_pytorch():
        dense = training(model_of("dense", values_lr=None))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-10)
