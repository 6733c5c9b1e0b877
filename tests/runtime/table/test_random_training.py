"""Random training, by rows and with dense gradients: the numbers are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers

from tests.planned import batch
from tests.runtime.table.stepping import evaluate, model_of, snapshot

# --- random training ----------------------------------------------------------------------------------------------

ACTIONS = ("step", "step", "step", "accumulate", "skip", "clip", "zero", "schedule", "evaluate", "save", "load", "new")


class Loop:
    """A training of one model that can do all ACTIONS."""

    def __init__(self, values_grad: str, values_lr: float | None, sgd: bool) -> None:
        self.model, self.sgd, self.batch = model_of(values_grad, values_lr=values_lr, memory_layers=1), sgd, 0
        self.seen: list[Tensor] = []
        self.new()
        self.save()

    def new(self) -> None:
        make = SGD if self.sgd else AdamW
        self.optimizer = make(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.scheduler = schedulers.LambdaLR(self.optimizer, lambda step: 0.7**step)

    def backward(self) -> None:
        self.batch += 1
        self.model(*batch(self.batch, size=1)).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def accumulate(self) -> None:
        self.backward()
        self.optimizer.step()

    def skip(self) -> None:
        self.optimizer.zero_grad()
        self.backward()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def schedule(self) -> None:
        self.scheduler.step()

    def evaluate(self) -> None:
        self.seen.append(evaluate(self.model))

    def save(self) -> None:
        parts = (self.model, self.optimizer, self.scheduler)
        self.saved = copy.deepcopy([part.state_dict() for part in parts])

    def load(self) -> None:
        for part, state in zip((self.model, self.optimizer, self.scheduler), copy.deepcopy(self.saved), strict=True):
            part.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@settings(deadline=None, max_examples=15, derandomize=True, database=None)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), min_size=4, max_size=16),
    values_lr=st.sampled_from([None, 2e-3]),
    sgd=st.booleans(),
)
def test_random_training_is_that_of_dense_gradients(actions, values_lr, sgd):
    loops = [Loop(values_grad, values_lr, sgd) for values_grad in ("sparse", "dense")]
    for loop in loops:
        for action in [*actions, "evaluate"]:
            getattr(loop, action)()
    sparse, dense = ((loop.seen, snapshot(loop.model)) for loop in loops)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-10)
