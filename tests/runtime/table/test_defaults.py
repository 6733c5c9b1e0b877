"""`torch.set_default_dtype` and `torch.set_default_device` change nothing of a training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from memcompile.optim import RowAdamW
from tests.planned import assert_same, batch
from tests.runtime.table.stepping import adamw, evaluate, model_of, snapshot, train

OPTIMIZERS = ("row_adamw", "lazy_adam", "row_wise_adagrad", "row_sgd")


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("values_optimizer", OPTIMIZERS)
@pytest.mark.usefixtures("_restored")
def test_of_a_planned_model(values_optimizer, values_grad):
    """The default device "meta" stands for an accelerator, where a model may be on the CPU."""
    results = []
    tokens = [batch(step) for step in range(3)]
    for changes in (False, True):
        model = model_of(values_grad, values_optimizer=values_optimizer, values_lr=None)
        optimizer = adamw(model)
        train(model, optimizer, [0])
        evaluated = batch(99)[0]
        if changes:
            torch.set_default_dtype(torch.bfloat16)
            torch.set_default_device("meta")
        for step in range(3):
            optimizer.zero_grad()
            model(*tokens[step]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            found = {"logits": model(evaluated), **snapshot(model)}
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        results.append(found | {"evaluated": evaluate(model)})
    assert_same(*results)


@pytest.mark.usefixtures("_restored")
def test_of_rows_that_come_twice():
    """Their gradient is summed."""
    weights = []
    for changes in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(7, 3, sparse=True)
        optimizer, rows = RowAdamW(embedding.parameters()), torch.tensor([1, 1, 5, 1])
        if changes:
            torch.set_default_device("meta")
        embedding(rows).square().sum().backward()
        optimizer.step()
        torch.set_default_device(None)
        weights.append({"weight": embedding.weight.detach()})
    assert_same(*weights)
