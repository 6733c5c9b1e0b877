"""Steps of any optimizer: the values go by their own rate, and the groups look untouched."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from memcompile.runtime.pool import pool_of
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
    """The groups are restored by whichever comes first, the next step or a checkpoint."""

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
    optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict())

    optimizer.fails = True
    with pytest.raises(error):
        optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert layout(optimizer) == before

    with pytest.raises(error):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert layout(optimizer) == before
    fresh = SGD(model.parameters(), lr=0.1, momentum=0.9)
    fresh.load_state_dict(saved)


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
        functools.partial(Adam, lr=0.1, amsgrad=True),
    ],
    ids=["plain", "foreach", "fused", "tensor lr", "fused tensor lr", "amsgrad"],
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


def test_lbfgs_has_one_rate_for_all():
    model = planned_gpt(values_lr=123.0)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=1)

    def closure() -> Tensor:
        backward(model)
        return model(*batch()).detach()

    (size,) = step_sizes(optimizer, [model.memory_values], closure=closure)
    assert 0 < size.abs().max() <= 1e-2
    assert len(optimizer.param_groups) == 1


def test_state_of_the_values_is_kept_between_steps():
    model = planned_gpt()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    backward(model)
    gradient = model.memory_values.grad.clone()
    optimizer.step()
    (second,) = step_sizes(optimizer, [model.memory_values])
    torch.testing.assert_close(second, VALUES_LR * 1.9 * gradient, rtol=0, atol=1e-7)


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


# --- the user's own hooks ---------------------------------------------------------------------------------------------


def clipped_by_a_hook(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=1.0)

    def clip(optimizer: Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1e-3)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def cleared_by_a_hook(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: model.zero_grad())
    return optimizer


@pytest.mark.parametrize("build", [clipped_by_a_hook, cleared_by_a_hook])
def test_hooks_of_the_user_see_the_values_in_their_group(build):
    """A hook before the step sees their gradient, and may change it; after the step they have moved."""
    results = []
    for gradient in ("dense", "sparse"):
        model = planned_gpt(values_grad=gradient, values_lr=None, n_keys=16).double()
        start, optimizer = model.memory_values.detach().clone(), build(model)
        for step in range(3):
            if build is clipped_by_a_hook:
                optimizer.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()
            if step == 0:  # later than the library's own
                optimizer.register_step_pre_hook(lambda o, *_: None)
        results.append(start - model.state_dict()["memory_values"])
    assert results[0].any()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


def test_hooks_of_all_optimizers_see_one_step():
    model = planned_gpt(values_grad="sparse", n_keys=16)
    optimizer, seen = AdamW(model.parameters()), []
    handle = register_optimizer_step_post_hook(lambda o, *_: seen.append(o))
    model(*batch()).backward()
    optimizer.step()
    handle.remove()
    assert seen == [optimizer]
