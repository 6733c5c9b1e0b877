"""`torch.set_default_dtype` and `torch.set_default_device` change nothing of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from memcompile.optim import RowAdamW
from tests.planned import assert_same, batch
from tests.runtime.table.stepping import adamw, evaluate, model_of, snapshot, train

OPTIMIZERS = ("row_adamw", "lazy_adam", "row_wise_adagrad", "row_sgd")


@contextlib.contextmanager
def other_defaults() -> Iterator[None]:
    """The device "meta" stands for an accelerator, where a model may be on the CPU."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
@pytest.mark.parametrize("values_optimizer", OPTIMIZERS)
def test_of_a_planned_model(values_optimizer, values_grad):
    results = []
    tokens, evaluated = [batch(step) for step in range(3)], batch(99)[0]
    for defaults in (contextlib.nullcontext, other_defaults):
        model = model_of(values_grad, values_optimizer=values_optimizer, values_lr=None)
        optimizer = adamw(model)
        train(model, optimizer, [0])
        with defaults():
            for step in range(3):
                optimizer.zero_grad()
                model(*tokens[step]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            with torch.no_grad():
                found = {"logits": model(evaluated), **snapshot(model)}
        results.append(found | {"evaluated": evaluate(model)})
    assert_same(*results)


def test_of_rows_that_come_twice():
    """Their gradient is summed."""
    weights = []
    for defaults in (contextlib.nullcontext, other_defaults):
        torch.manual_seed(0)
        embedding = nn.Embedding(7, 3, sparse=True)
        optimizer, rows = RowAdamW(embedding.parameters()), torch.tensor([1, 1, 5, 1])
        with defaults():
            embedding(rows).square().sum().backward()
            optimizer.step()
        weights.append({"weight": embedding.weight.detach()})
    assert_same(*weights)
