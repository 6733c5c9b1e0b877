"""Optimizers: the values step by their own rate, groups look untouched, and those alive at plan time are adopted."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import memcompile
from memcompile.runtime.pool import pool_of
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch, planned_gpt

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


# --- the values' own learning rate --------------------------------------------------------------------------------


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


# --- adoption ---------------------------------------------------------------------------------------------------


def gpt_and(make) -> tuple[nn.Module, Optimizer]:
    model = tiny_gpt(layers=2)
    return model, make(model)


def held(*optimizers: Optimizer) -> list[int]:
    return [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]


def test_replaced_parameters_and_their_state_leave_and_the_memory_joins():
    model, optimizer = gpt_and(lambda m: AdamW(m.parameters(), lr=1e-3))
    backward(model)
    optimizer.step()
    kept = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.blocks[0].parameters()}
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())
    assert set(optimizer.state) <= set(model.parameters())
    for parameter in model.blocks[0].parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], kept[id(parameter)])
    backward(model)
    assert all(step.any() for step in step_sizes(optimizer, list(model.parameters())))
    assert set(optimizer.state) == set(model.parameters())


def test_matrices_and_vectors_join_the_groups_of_their_kind():
    def make(model: nn.Module) -> Optimizer:
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        return AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)

    model, optimizer = gpt_and(make)
    before = [(id(g), id(g["params"])) for g in optimizer.param_groups]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert [(id(g), id(g["params"])) for g in optimizer.param_groups] == before
    for group, is_kind in zip(optimizer.param_groups, (lambda p: p.dim() > 1, lambda p: p.dim() <= 1), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if is_kind(p)}


def test_an_adopted_optimizer_has_the_order_of_a_new_one():
    """Checkpoints of optimizers match parameters by position."""
    model, adopted = gpt_and(lambda model: AdamW(model.parameters(), lr=1e-3))
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert held(adopted) == [id(p) for p in model.parameters()]
    backward(model)
    adopted.step()
    resumed = AdamW(model.parameters(), lr=1e-3)
    resumed.load_state_dict(adopted.state_dict())
    for parameter in model.parameters():
        assert torch.equal(resumed.state[parameter]["exp_avg"], adopted.state[parameter]["exp_avg"])


def without_ffn_biases() -> nn.Module:
    model = tiny_gpt(layers=2)
    for block in model.blocks:
        block.ffn[0].bias = block.ffn[2].bias = None
    return model


def test_vectors_join_the_matrices_where_there_is_one_group():
    model = without_ffn_biases()
    optimizer = SGD(model.parameters(), lr=0.1)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())


def test_vectors_join_the_group_of_vectors_where_the_ffn_has_no_bias():
    model = without_ffn_biases()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = SGD([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.1)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() <= 1 for p in optimizer.param_groups[1]["params"])


def test_two_optimizers_that_share_the_work_never_hold_a_parameter_twice():
    model = tiny_gpt(layers=2)
    matrices = SGD([p for p in model.parameters() if p.dim() > 1], lr=0.1)
    vectors = AdamW([p for p in model.parameters() if p.dim() <= 1], lr=0.1)
    memcompile.plan(model, memory_layers=2, **MEMORY)
    assert sorted(held(matrices, vectors)) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() > 1 for g in matrices.param_groups for p in g["params"])

    by_block = tiny_gpt(layers=2)
    rest = [p for n, p in by_block.named_parameters() if "blocks.1" not in n]
    first, second = SGD(by_block.blocks[1].parameters(), lr=0.1), SGD(rest, lr=0.1)
    memcompile.plan(by_block, memory_layers=2, **MEMORY)
    assert sorted(held(first, second)) == sorted(id(p) for p in by_block.parameters())


def test_two_optimizers_for_the_same_parameters_are_both_adopted():
    model = tiny_gpt(layers=2)
    optimizers = [SGD(model.parameters(), lr=0.1), AdamW(model.parameters(), lr=0.1)]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    for optimizer in optimizers:
        assert sorted(held(optimizer)) == sorted(id(p) for p in model.parameters())


def test_strangers_are_left_alone():
    model, other = tiny_gpt(layers=2), tiny_gpt(layers=2)
    strangers = [SGD(other.parameters(), lr=0.1), SGD(model.head.parameters(), lr=0.1)]
    before = [layout(optimizer) for optimizer in strangers]
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert [layout(optimizer) for optimizer in strangers] == before


def test_names_of_parameters_stay_beside_their_parameters():
    model, optimizer = gpt_and(lambda m: SGD(m.named_parameters(), lr=0.5))
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    backward(model)
    optimizer.step()
    (group,) = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert len(names) == len(group["params"])


@pytest.mark.parametrize("fused", [None, True])
def test_adagrad_is_adopted_with_the_state_it_expects(fused):
    model, optimizer = gpt_and(lambda m: Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.1, fused=fused))
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    backward(model)
    gradient = model.memory_values.grad
    (size,) = step_sizes(optimizer, [model.memory_values])
    torch.testing.assert_close(size, VALUES_LR * gradient / ((gradient**2 + 0.1).sqrt() + 1e-10), rtol=1e-4, atol=1e-7)


def test_lbfgs_is_adopted_in_mid_training():
    model, optimizer = gpt_and(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        return loss

    optimizer.step(closure)
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    first = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    assert closure().item() < first


# --- adoption where the memory is added -------------------------------------------------------------------------


def test_an_added_memory_joins_and_nothing_leaves():
    model, optimizer = gpt_and(lambda m: AdamW(m.parameters(), lr=1e-3))
    backward(model)
    optimizer.step()
    state = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    assert held(optimizer) == [id(p) for p in model.parameters()]
    assert all(torch.equal(optimizer.state[p]["exp_avg"], average) for p, average in state.items())
    backward(model)
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())


def test_an_added_memory_joins_the_groups_of_its_ffn():
    model = tiny_gpt(layers=2)
    ffn, rest = model.blocks[1].ffn, [p for n, p in model.named_parameters() if "blocks.1.ffn" not in n]
    matrices = SGD([p for p in ffn.parameters() if p.dim() > 1], lr=0.1)
    vectors = SGD([p for p in ffn.parameters() if p.dim() <= 1], lr=0.1)
    stranger = SGD(rest, lr=0.1)
    before = layout(stranger)
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    assert layout(stranger) == before
    owners = {id(p) for p in ffn.parameters()} | {id(model.memory_values)}
    for optimizer, is_kind in ((matrices, lambda p: p.dim() > 1), (vectors, lambda p: p.dim() <= 1)):
        assert set(held(optimizer)) == {id(p) for p in model.parameters() if id(p) in owners and is_kind(p)}


def test_lbfgs_with_an_added_memory_forgets_its_history():
    model, optimizer = gpt_and(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2))

    def closure() -> Tensor:
        backward(model)
        return model(*batch()).detach()

    optimizer.step(closure)
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    before = model.blocks[1].ffn[2].memory.out_bias.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(model.blocks[1].ffn[2].memory.out_bias, before)
