"""A step that raises at any of its lines leaves groups, gradients and state as any optimizer would, and every row where
it was, or stepped once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

import memcompile
from memcompile.runtime.patches import optimizer_step
from memcompile.runtime.pool import pool_of
from memcompile.runtime.table import hooks
from memcompile.runtime.table.warnings import untrained
from tests.planned import planned_gpt
from tests.runtime.table.optimizer_kinds import Clipped, SharpnessAware

PACKAGE = str(Path(memcompile.__file__).parent / "runtime")
OPTIMIZERS = str(Path(torch.optim.__file__).parent)


class Injected(Exception):
    pass


Line = tuple[str, int]


def lines_of(call: Callable[[], Any]) -> list[Line]:
    """Every line that a call runs of ours and of PyTorch's optimizers, once."""
    seen: dict[Line, None] = {}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith((PACKAGE, OPTIMIZERS)):
            return None
        if event == "line":
            seen[frame.f_code.co_filename, frame.f_lineno] = None
        return trace

    _traced(trace, call)
    return list(seen)


def raise_at(line: Line, call: Callable[[], Any]) -> bool:
    """Calls, and raises where the line is reached first. Returns whether the exception came out."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != line[0]:
            return None
        if event == "line" and frame.f_lineno == line[1]:
            sys.settrace(None)
            raise Injected
        return trace

    try:
        with torch.enable_grad():  # PyTorch's optimizers leave another mode behind where their last lines raise
            _traced(trace, call)
    except Injected:
        return True
    return False


def _traced(trace: Any, call: Callable[[], Any]) -> None:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


class Training:
    """Three steps with gradients that do not depend on parameters, of the table and two others."""

    def __init__(self, values_grad: str, make: Callable[[list[nn.Parameter]], Optimizer], closes: bool) -> None:
        self.model = planned_gpt(values_grad=values_grad, values_lr=None).double()
        self.values = self.model.memory_values
        self.parameters = [self.model.norm.weight, self.values, self.model.head.weight]
        self.start = [p.detach().clone() for p in self.parameters]
        self.make, self.closes, self.sparse = make, closes, values_grad == "sparse"
        self.restart()

    def restart(self) -> None:
        pool = pool_of(self.model)
        assert pool is not None
        pool.table.end()
        for p, value in zip(self.parameters, self.start, strict=True):
            p.data.copy_(value)
            p.grad = None
        self.optimizer = self.make(self.parameters)

    def gradient(self, step: int) -> Tensor:
        """Of some rows alone."""
        generator = torch.Generator().manual_seed(step)
        dense = torch.randn(self.values.shape, dtype=torch.float64, generator=generator)
        dense[torch.arange(len(dense)) % 3 != step] = 0
        return dense

    def backward(self, step: int) -> None:
        for p in self.parameters:
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        dense = self.gradient(step)
        self.values.grad = dense.to_sparse(1).coalesce() if self.sparse else dense

    def step(self, step: int) -> None:
        def closure() -> float:
            self.backward(step)
            return 1.0 - step

        if self.closes:
            self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            self.optimizer.step()

    def table_after(self, steps: list[int], optimizer: Callable[[list[Tensor]], Optimizer]) -> Tensor:
        values = self.start[1].clone()
        alone = optimizer([values])
        for step in steps:
            values.grad = self.gradient(step)
            alone.step()
        return values

    def table(self) -> Tensor:
        return self.model.state_dict()["memory_values"].clone()


def adamw(parameters: list[Tensor]) -> Optimizer:
    return AdamW(parameters, lr=1e-2, weight_decay=0.1)


CASES: dict[str, tuple[Callable[[Any], Optimizer], bool, Callable[[list[Tensor]], Optimizer]]] = {
    "AdamW": (adamw, False, adamw),
    "AdamW(foreach=False)": (lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False), False, adamw),
    "SGD": (lambda p: SGD(p, lr=1e-2, weight_decay=0.1), False, lambda p: SGD(p, lr=1e-2, weight_decay=0.1)),
    "LBFGS": (lambda p: LBFGS(p, lr=1e-2, max_iter=1), True, lambda p: AdamW(p, lr=1e-2, weight_decay=0.0)),
    "SAM": (lambda p: SharpnessAware(p, lr=1e-2), True, lambda p: AdamW(p, lr=1e-2)),
    "a subclass": (  # halves gradients, which changes nothing without eps
        lambda p: Clipped(p, lr=1e-2, weight_decay=0.1, eps=1e-30),
        False,
        lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-30),
    ),
}


def _groups(optimizer: Optimizer) -> list[Any]:
    groups = optimizer.param_groups
    return [(id(g), [id(p) for p in g["params"]], {k: v for k, v in g.items() if k != "params"}) for g in groups]


def _chosen(lines: list[Line], name: str, values_grad: str) -> list[Line]:
    """Every line around the step, and every one of rows for one optimizer; some of PyTorch's, but not while SAM has
    moved parameters by itself.
    """
    around = (hooks.__file__, inspect.getfile(optimizer_step))
    every = (PACKAGE,) if (name, values_grad) == ("AdamW", "sparse") else around
    return [line for i, line in enumerate(lines) if line[0].startswith(every) or (i % 7 == 0 and name != "SAM")]


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_raises_at_any_line(name, values_grad, monkeypatch):
    """The step that raised is dropped, or tried again. Its rows have moved where it is counted, and only there."""
    monkeypatch.setattr(untrained, "live_optimizers", list)  # which takes long, once for each optimizer
    make, closes, alone = CASES[name]
    training, lines, came_out = Training(values_grad, make, closes), [], 0

    def in_the_middle() -> None:
        training.restart()
        training.backward(0)
        training.step(0)
        training.backward(1)

    for _ in range(2):  # what is done once in a process is done
        in_the_middle()
        lines = lines_of(lambda: training.step(1))
    lines = _chosen(lines, name, values_grad)
    assert len(lines) > 50
    for number, line in enumerate(lines):
        in_the_middle()
        groups, where = _groups(training.optimizer), f"{Path(line[0]).name}:{line[1]}"
        came_out += raise_at(line, lambda: training.step(1))
        assert groups == _groups(training.optimizer), where
        assert len({p.grad is None for p in training.parameters}) == 1, where
        counted = int(getattr(training.optimizer, "base_optimizer", training.optimizer).state[training.values]["step"])
        done = list(range(counted))
        assert_same_table(training, done, alone, where)
        if number % 2:
            training.optimizer.zero_grad()
            assert all(p.grad is None for p in training.parameters), where
        else:
            training.backward(1)
            training.step(1)
            done.append(1)
        training.backward(2)
        training.step(2)
        assert_same_table(training, [*done, 2], alone, where)
    assert came_out > len(lines) / 2


def assert_same_table(training: Training, done: list[int], alone: Any, where: str) -> None:
    difference = (training.table() - training.table_after(done, alone)).abs().max()
    assert difference < 1e-10, f"{where}: the table differs by {difference}"
