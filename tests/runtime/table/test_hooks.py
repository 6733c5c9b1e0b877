"""Around a step of any optimizer: the table steps at its own rate, and groups and gradients look as before."""

from __future__ import annotations

import copy
import functools
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from memcompile.runtime.pool import pool_of
from memcompile.runtime.table.table import live_tables
from tests.planned import batch, planned_gpt

VALUES_LR = 1e-3


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(*batch()).backward()


def layout(optimizer: Optimizer) -> list:
    """What a user sees of the groups: the objects, and every option in order."""
    return [
        (
            id(group),
            id(group["params"]),
            [id(p) for p in group["params"]],
            {k: group[k] for k in group if k != "params"},
        )
        for group in optimizer.param_groups
    ]


def step_sizes(optimizer: Optimizer, parameters: list[nn.Parameter], **kwargs) -> list[Tensor]:
    before = [p.detach().clone() for p in parameters]
    optimizer.step(**kwargs)
    return [b - p.detach() for p, b in zip(parameters, before, strict=True)]


@pytest.mark.parametrize(("values_lr", "expected"), [(VALUES_LR, VALUES_LR), (None, 0.5), (0.0, 0.0), (3, 3)])
def test_values_step_by_their_own_rate(values_lr, expected):
    model = planned_gpt(values_lr=values_lr).double()
    optimizer = SGD(model.parameters(), lr=0.5)
    before = layout(optimizer)
    backward(model)
    head = model.head.weight
    values_step, head_step = step_sizes(optimizer, [model.memory_values, head])
    torch.testing.assert_close(values_step, expected * model.memory_values.grad, rtol=0, atol=1e-15)
    torch.testing.assert_close(head_step, 0.5 * head.grad, rtol=0, atol=1e-15)
    assert model.memory_values.grad.any()
    assert layout(optimizer) == before


@functools.cache
def two_models() -> list[nn.Module]:
    """Planned with different rates for their values; every gradient is one."""
    models = [planned_gpt(values_lr=1e-3).double(), planned_gpt(values_lr=2e-2).double()]
    for model in models:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    return models


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(data=st.data(), named=st.booleans(), raises=st.booleans())
def test_any_distribution_over_groups_is_split_and_joined(data, named, raises):
    models = two_models()
    rates = {id(m.memory_values): pool_of(m).config.values_lr for m in models}
    items = [(f"{i}.{n}", p) for i, m in enumerate(models) for n, p in m.named_parameters()]
    chosen = data.draw(st.permutations([(n, p) for n, p in items if "memory" in n or "norm" in n]))
    cuts = data.draw(st.lists(st.integers(0, len(chosen)), max_size=4).map(sorted))
    parts = [chosen[a:b] for a, b in zip([0, *cuts], [*cuts, len(chosen)], strict=True)]
    groups = [
        {"params": part if named else [p for _, p in part], "lr": 0.1 * (i + 1)}
        for i, part in enumerate(part for part in parts if part)
    ]
    optimizer = SGD(groups, lr=1.0)
    before = layout(optimizer)

    if raises:

        def closure() -> None:
            assert layout(optimizer) == before, "a closure sees the user's groups"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert layout(optimizer) == before
    expected = [rates.get(id(p), g["lr"]) for g in optimizer.param_groups for p in g["params"]]
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for rate, size in zip(expected, step_sizes(optimizer, parameters), strict=True):
        torch.testing.assert_close(size, torch.full_like(size, rate), rtol=0, atol=1e-12)
    assert layout(optimizer) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_is_interrupted_in_its_middle(error):
    """Groups, gradients and states are as they were, and no row has moved. The step that is tried again is one step."""

    class Interrupted(SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise error
            return super().step(closure)

    model = planned_gpt()
    optimizer = Interrupted(model.parameters(), lr=0.1, momentum=0.9)
    before = layout(optimizer)
    backward(model)
    gradient = model.memory_values.grad
    optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict())

    optimizer.fails = True
    values = model.memory_values.detach().clone()
    for _ in range(2):
        with pytest.raises(error):
            optimizer.step()
        assert layout(optimizer) == before
        assert model.memory_values.grad is gradient
        assert torch.equal(model.memory_values, values)
        saved = optimizer.state_dict()
        assert saved["param_groups"] == expected["param_groups"]
        others = [number for number in expected["state"] if number != 0]  # the values are the first parameter
        assert all(
            torch.equal(saved["state"][n]["momentum_buffer"], expected["state"][n]["momentum_buffer"]) for n in others
        )
    optimizer.fails = False
    values, head = step_sizes(optimizer, [model.memory_values, model.head.weight])
    assert head.any() and values.any()
    assert optimizer.state[model.memory_values]["step"] == 2
    assert model.memory_values.grad is gradient
    optimizer.step()
    assert optimizer.state[model.memory_values]["step"] == 3
    assert layout(optimizer) == before
    fresh = SGD(model.parameters(), lr=0.1, momentum=0.9)
    fresh.load_state_dict(saved)


@pytest.mark.parametrize("clear", [lambda m, o: m.zero_grad(), lambda m, o: o.zero_grad()])
def test_zero_grad_after_a_step_that_raised_drops_the_gradient(clear):
    model = planned_gpt()
    optimizer = SGD(model.parameters(), lr=0.1)

    def failing(*_: object) -> None:
        raise ValueError("a hook's")

    backward(model)
    handle = optimizer.register_step_post_hook(failing)
    with pytest.raises(ValueError, match="a hook's"):
        optimizer.step()
    handle.remove()
    clear(model, optimizer)
    (size,) = step_sizes(optimizer, [model.memory_values])
    assert not size.any()
    assert model.memory_values.grad is None
    model(*batch(1)).backward()
    fresh = planned_gpt()
    fresh.load_state_dict(model.state_dict())
    fresh(*batch(1)).backward()
    torch.testing.assert_close(model.memory_values.grad, fresh.memory_values.grad)
    (size,) = step_sizes(optimizer, [model.memory_values])
    torch.testing.assert_close(size, VALUES_LR * fresh.memory_values.grad, rtol=0, atol=1e-7)


def test_a_closure_by_position_and_by_keyword():
    model = planned_gpt()
    optimizer, seen = SGD(model.parameters(), lr=0.1), []

    def closure() -> Tensor:
        seen.append(len(optimizer.param_groups))
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        return loss

    for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        before = model.memory_values.detach().clone()
        loss = call()
        assert loss.ndim == 0
        moved = before - model.memory_values.detach()
        torch.testing.assert_close(moved, VALUES_LR * model.memory_values.grad, rtol=0, atol=1e-7)
    assert seen == [1, 1]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(AdamW, lr=0.1),
        functools.partial(AdamW, lr=0.1, foreach=True),
        functools.partial(AdamW, lr=0.1, fused=True),
        functools.partial(AdamW, lr=torch.tensor(0.1, dtype=torch.float64), foreach=False),
        functools.partial(AdamW, lr=torch.tensor(0.1, dtype=torch.float64), fused=True),
        functools.partial(Adam, lr=0.1),
    ],
    ids=["plain", "foreach", "fused", "tensor lr", "fused tensor lr", "Adam"],
)
def test_forms_of_adam(make):
    """The first step of Adam is the learning rate itself, whatever the gradient."""
    model = planned_gpt(values_lr=VALUES_LR).double()
    optimizer = make(model.parameters(), weight_decay=0.0, eps=1e-30)
    backward(model)
    lr = optimizer.param_groups[0]["lr"]
    (size,) = step_sizes(optimizer, [model.memory_values])
    gradient = model.memory_values.grad
    touched = gradient != 0
    assert touched.any()
    torch.testing.assert_close(size[touched], VALUES_LR * gradient.sign()[touched], rtol=1e-9, atol=0)
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == 0.1


def test_values_in_lbfgs_step_once_by_their_own_rate():
    """LBFGS moves the others, several times; the values' gradient is that of its last closure."""
    model = planned_gpt(values_lr=VALUES_LR).double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=3)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        seen.append(model.memory_values.grad.clone())
        return loss

    values, head = step_sizes(optimizer, [model.memory_values, model.head.weight], closure=closure)
    assert len(seen) > 1 and head.any()
    torch.testing.assert_close(model.memory_values.grad, seen[-1], rtol=0, atol=0)
    touched = seen[-1] != 0
    torch.testing.assert_close(  # the first step of AdamW, but for eps
        values[touched], VALUES_LR * seen[-1].sign()[touched], rtol=0, atol=0.1 * VALUES_LR
    )
    assert not values[~touched].any()  # LBFGS has no weight decay
    assert optimizer.state[model.memory_values]["step"] == 1


def test_state_of_the_values_is_kept_between_steps():
    """Of the same gradient twice, AdamW's second step is as large as its first."""
    model = planned_gpt(values_lr=VALUES_LR).double()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    backward(model)
    first, second = (step_sizes(optimizer, [model.memory_values])[0] for _ in range(2))
    touched = model.memory_values.grad.abs() > 1e-4
    assert touched.any()
    torch.testing.assert_close(second[touched], first[touched], rtol=1e-3, atol=0)
    assert optimizer.state[model.memory_values]["step"] == 2


def test_a_copy_of_the_model_has_the_rate_too():
    model = planned_gpt()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = SGD(twin.parameters(), lr=0.5)
        backward(twin)
        (size,) = step_sizes(optimizer, [twin.memory_values])
        torch.testing.assert_close(size, VALUES_LR * twin.memory_values.grad, rtol=0, atol=1e-7)


def test_an_optimizer_inside_torch_compile():
    model = planned_gpt()
    optimizer = SGD(model.parameters(), lr=0.5)
    before = layout(optimizer)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    backward(model)
    values = model.memory_values.detach().clone()
    step()
    torch.testing.assert_close(
        values - model.memory_values.detach(), VALUES_LR * model.memory_values.grad, rtol=0, atol=1e-7
    )
    assert layout(optimizer) == before


def test_an_optimizer_of_the_values_alone_that_is_tried_again():
    model = planned_gpt()
    optimizer, fails = SGD([model.memory_values], lr=0.1), [True]

    def closure() -> None:
        if fails.pop():
            raise ValueError("a closure's")

    backward(model)
    with pytest.raises(ValueError, match="a closure's"):
        optimizer.step(closure)
    fails.append(False)
    (size,) = step_sizes(optimizer, [model.memory_values], closure=closure)
    assert size.any()


# --- when they are there ----------------------------------------------------------------------------------------------


def test_nothing_of_ours_is_left_when_models_are_gone():
    def hooks() -> list[object]:
        found = torch_optimizer._global_optimizer_pre_hooks.values()
        return [hook for hook in found if hook.__module__.startswith("memcompile")]

    gc.collect()
    alive = len(live_tables)
    model = planned_gpt()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    assert len(hooks()) == 1
    del model, optimizer
    gc.collect()
    assert len(live_tables) == alive
    if alive == 0:
        assert not hooks()
