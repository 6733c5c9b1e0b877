"""What names in the code of an optimizer's class tell of it."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from memcompile.runtime.table.step_code import calls_parent, reads_parameters
from tests.runtime.table import optimizer_kinds as kinds


class BySuper(AdamW):
    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


class ByName(AdamW):
    def step(self, closure=None):
        return AdamW.step(self, closure)


class InALambda(AdamW):
    def step(self, closure=None):
        return (lambda: super(InALambda, self).step(closure))()


class OfItsOwn(AdamW):
    """Counts in `state["step"]`, which is no call."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1


class StepsAnother(AdamW):
    def step(self, closure=None):
        self.scheduler.step()


@pytest.mark.parametrize(
    ("kind", "calls"), [(BySuper, True), (ByName, True), (InALambda, True), (OfItsOwn, False), (StepsAnother, False)]
)
def test_which_steps_call_their_parents(kind, calls):
    assert calls_parent(vars(kind)["step"], [AdamW]) == calls


class OnlySaves(Optimizer):
    """Names parameters where it does not step."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.zero_grad()
        return self.optimizer.step(closure)

    def switch(self):
        return [group["params"] for group in self.optimizer.param_groups]


class ReadsInAMethod(OnlySaves):
    def step(self, closure=None):
        self.average()

    def average(self):
        return self.switch()


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        (kinds.Lookahead, True),
        (kinds.SharpnessAware, True),
        (kinds.Several, False),
        (kinds.Partitioned, False),
        (kinds.NoSuperInit, False),
        (OnlySaves, False),
        (ReadsInAMethod, True),
        (SGD, True),
    ],
)
def test_which_optimizers_read_parameters(kind, reads):
    assert reads_parameters(kind) == reads


def test_that_of_accelerate_reads_none():
    """The Hugging Face Trainer steps by it: a table would be brought up to date in each step."""
    optimizer = pytest.importorskip("accelerate.optimizer")
    assert not reads_parameters(optimizer.AcceleratedOptimizer)
