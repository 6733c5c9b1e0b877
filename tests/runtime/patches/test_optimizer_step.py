"""Which class of an optimizer has its step run inside of the table's."""

from __future__ import annotations

import pytest
import torch
from torch.optim import AdamW

from memcompile.runtime.patches.optimizer_step import calls_parent


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
