"""A table in the middle of a training: checkpoints, casts, and new optimizers."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from memcompile.runtime.pool import pool_of
from tests.planned import assert_same, batch, planned_gpt
from tests.runtime.table.stepping import SIZES, adamw, assert_as_dense, evaluate, model_of, snapshot, train

# --- checkpoints --------------------------------------------------------------------------------------------------


def states(model: nn.Module, optimizer: Optimizer) -> tuple[dict, dict]:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("order", ["model", "optimizer", "model, optimizer", "optimizer, model", "distributed", "none"])
def test_loading_in_mid_training(order):
    def training(model: nn.Module) -> nn.Module:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        saved = copy.deepcopy(get_state_dict(model, optimizer)) if order == "distributed" else states(model, optimizer)
        train(model, optimizer, range(3, 6))
        if order == "distributed":
            set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        for part in order.split(", "):
            if part == "model":
                model.load_state_dict(saved[0])
            if part == "optimizer":
                optimizer.load_state_dict(saved[1])
        if order == "none":
            optimizer.state.clear()
        return train(model, optimizer, range(6, 8))

    assert_as_dense(training)


@pytest.mark.parametrize("make", [adamw, lambda model: SGD(model.parameters(), lr=0.1, weight_decay=0.1)])
def test_dense_and_sparse_training_read_each_others_checkpoints(make):
    trained, results = [], []
    for values_grad in ("sparse", "dense"):
        model = model_of(values_grad)
        optimizer = make(model)
        train(model, optimizer, range(3))
        trained.append(states(model, optimizer))
    for values_grad, (weights, state) in zip(("dense", "sparse"), trained, strict=True):
        model = model_of(values_grad, seed=1)
        optimizer = make(model)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        results.append(snapshot(train(model, optimizer, range(3, 6))))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)
    layouts = [{name: value.shape for name, value in state["state"].get(0, {}).items()} for _, state in trained]
    assert layouts[0] == layouts[1] | {"step": torch.Size([])}, "memory_values are the first parameter"


def test_resuming_under_a_schedule_is_bit_for_bit():
    """Rates and betas change in every step: what has gone on since it was saved has not more of their history."""

    def build(seed: int) -> tuple[nn.Module, Optimizer, OneCycleLR]:
        model = model_of("sparse", seed=seed)
        optimizer = adamw(model)
        return model, optimizer, OneCycleLR(optimizer, 0.1, total_steps=12)

    def go_on(model: nn.Module, optimizer: Optimizer, schedule: OneCycleLR, steps: range) -> dict[str, Tensor]:
        for step in steps:
            train(model, optimizer, [step])
            schedule.step()
        return snapshot(model)

    saved, resumed = build(0), build(1)
    go_on(*saved, range(5))
    for one, other in zip(saved, resumed, strict=True):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert_same(go_on(*resumed, range(5, 12)), go_on(*saved, range(5, 12)))


@pytest.mark.parametrize("old", ["alive", "deleted"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_new_optimizer_in_mid_training(old, assign):
    """Values that are assigned are other parameters, which a new optimizer must be given."""

    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(4))
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        kept = [optimizer] if old == "alive" else []
        del optimizer
        gc.collect()
        read, new = evaluate(model), adamw(model)
        train(model, new, range(4, 7))
        for optimizer in kept:
            train(model, optimizer, [7])
        return [read, *snapshot(train(model, new, [8])).values()]

    assert_as_dense(training)


@pytest.mark.parametrize("inside", [contextlib.nullcontext, in_kernel_invocation_manager])
def test_an_optimizer_that_is_collected_while_something_is_traced(inside):
    """Its table stays as its last step has it, without state."""

    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        with FakeTensorMode() as mode, inside(mode):
            del optimizer
            gc.collect()
        pool = pool_of(model)
        assert all(tensor.numel() == 0 for tensor in pool.table.row_state(pool.values)[1:])
        return [model.memory_values.detach().clone(), *snapshot(model).values()]

    assert_as_dense(training)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_bf16_models(state_dtype):
    model = planned_gpt(values_grad="sparse", values_state_dtype=state_dtype, values_lr=None, **SIZES).bfloat16()
    optimizer = adamw(model)
    first = model(*batch()).item()
    train(model, optimizer, [0] * 12)
    assert model(*batch()).item() < first - 1
    assert optimizer.state[model.memory_values]["exp_avg"].dtype is getattr(torch, state_dtype)
    assert model.memory_values.dtype is model.memory_values.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("reads", [False, True])
def test_a_cast_in_mid_training(reads):
    def training(model: nn.Module) -> list[Tensor]:
        optimizer = adamw(model)
        train(model, optimizer, range(3))
        model.float()
        read = evaluate(model) if reads else torch.zeros(())
        state = copy.deepcopy(optimizer.state_dict())
        values = model.memory_values.detach().clone()
        optimizer = adamw(model)
        optimizer.load_state_dict(copy.deepcopy(state))
        train(model, optimizer, range(3, 5))
        assert optimizer.state[model.memory_values]["exp_avg"].dtype is torch.float32
        return [read, values, state["state"][0]["exp_avg"].float()]

    assert_as_dense(training, tolerance=1e-5)


def test_two_models_in_one_optimizer():
    results = []
    for values_grad in ("sparse", "dense"):
        models = [model_of(values_grad), model_of(values_grad, seed=1, values_lr=1e-2)]
        optimizer = AdamW([p for model in models for p in model.parameters()], lr=1e-2)
        for step in range(4):
            optimizer.zero_grad()
            sum(model(*batch(step + i)) for i, model in enumerate(models) if step != i).backward()
            optimizer.step()
        results.append([snapshot(model) for model in models])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)
