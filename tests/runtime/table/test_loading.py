"""Optimizer checkpoints: the state of values that are stepped by rows comes back in the dtype that it was saved in."""

from __future__ import annotations

import io

import pytest
import torch

from tests.planned import batch, planned_gpt

PLAN = {"layers": 3, "memory_layers": 2, "n_keys": 32, "values_grad": "sparse"}


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()


def build(dtype, state_dtype):
    model = planned_gpt(**PLAN, values_state_dtype=state_dtype).to(dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit(dtype, state_dtype):
    model, optimizer = build(dtype, state_dtype)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    train(model, optimizer, range(4, 8))
    file.seek(0)
    saved = torch.load(file)
    resumed, other = build(dtype, state_dtype)
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    train(resumed, other, range(4, 8))
    assert other.state[resumed.memory_values]["exp_avg"].dtype == getattr(torch, state_dtype)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("first", ["dense", "sparse"])
def test_dense_and_sparse_training_read_each_others_checkpoints(first):
    results = []
    for second in ("dense", "sparse"):
        model = planned_gpt(**PLAN | {"values_grad": first}).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, range(4))
        saved = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
        model = planned_gpt(**PLAN | {"values_grad": second}).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, range(4, 8))
        results.append({name: p for name, p in model.state_dict().items() if p.is_floating_point()})
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-10)


def test_a_pickled_optimizer_leaves_no_row_behind():
    """Its state has no missed steps; so the values have them."""
    model = planned_gpt(**PLAN).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(4))
    before = model.memory_values.detach().clone()
    torch.save(optimizer, io.BytesIO())
    assert not torch.equal(model.memory_values, before)
    stored = model.memory_values.detach().clone()
    assert torch.equal(model.state_dict()["memory_values"], stored)
