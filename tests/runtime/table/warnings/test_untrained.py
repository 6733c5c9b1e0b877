"""Parameters of a memory that no optimizer holds are told: at the plan, in the first step, and by explain()."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import memcompile
from memcompile.runtime.table.warnings import untrained
from tests.models import tiny_gpt
from tests.planned import MEMORY, batch, planned_gpt
from tests.runtime.table.stepping import model_of, train


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == untrained.__name__]


@pytest.fixture(autouse=True)
def _warnings_are_kept(caplog):
    with caplog.at_level(logging.WARNING, "memcompile"):
        yield


FIX = "They do not learn: give them to an optimizer, or freeze them by requires_grad_(False)"


# --- at the plan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["replace", "add"])
def test_a_frozen_model_with_an_optimizer_of_its_head(placement, caplog):
    model = tiny_gpt(layers=2).requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    memcompile.plan(model, memory_layers=2, placement=placement, **MEMORY)
    what = "memory_values and 14 parameters of 2 layers (blocks.0.ffn.2, blocks.1.ffn.2)"
    assert said(caplog) == [f"memcompile: no optimizer holds parameters of the memory: {what}. {FIX}"]
    caplog.clear()
    train(model, optimizer, range(3))
    (message,) = said(caplog)
    assert message == (
        f"memcompile: AdamW.step() trains a model, and no optimizer holds parameters of its memory: {what}. {FIX}"
    )


@pytest.mark.parametrize("loads", [False, True])
def test_a_model_that_is_frozen_after_the_plan(loads, caplog):
    """As PEFT freezes all of a model and adds adapters: the memory keeps the numbers that it was drawn with."""
    model = planned_gpt(layers=2)
    if loads:
        model.load_state_dict(planned_gpt(layers=2).state_dict())
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    train(model, AdamW(model.head.parameters()), range(3))
    assert [("frozen with the random numbers" in message) for message in said(caplog)] == [True] * (not loads)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.zeros(2, linear.in_features))
        self.up = nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def test_a_frozen_model_with_an_optimizer_of_its_adapters(caplog):
    model = tiny_gpt(layers=2).requires_grad_(False)
    for block in model.blocks:
        block.attention.out = Adapted(block.attention.out)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    memcompile.plan(model, memory_layers=[1], placement="add", **MEMORY)
    (message,) = said(caplog)
    assert "memory_values and 7 parameters of 1 layer (blocks.1.ffn.2)" in message
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if "memory" in n]})
    caplog.clear()
    train(model, optimizer, range(2))
    assert not said(caplog)


def test_layers_in_frozen_blocks(caplog):
    """The upper blocks are trained, with their memory and the table; what is below is told."""
    model = tiny_gpt(layers=3)
    model.blocks[:2].requires_grad_(False)
    optimizer = SGD(model.blocks[2].parameters(), lr=0.1)
    memcompile.plan(model, memory_layers="all", **MEMORY)
    (message,) = said(caplog)
    assert ": 14 parameters of 2 layers (blocks.0.ffn.2, blocks.1.ffn.2)." in message
    assert any(p is model.memory_values for p in optimizer.param_groups[0]["params"])


def test_nothing_is_told_before_there_is_an_optimizer(caplog):
    model = tiny_gpt(layers=2)
    stranger = SGD(tiny_gpt(layers=2).parameters(), lr=0.1)
    explanation = memcompile.plan(model, memory_layers=1, **MEMORY)
    assert not said(caplog) and stranger.param_groups
    assert explanation.untrained == explanation.optimizers == ()


# --- in a step -----------------------------------------------------------------------------------------------------


def of_layers(model: nn.Module) -> Optimizer:
    return AdamW([p for name, p in model.named_parameters() if name != "memory_values"])


def of_submodules(model: nn.Module) -> Optimizer:
    """As programs build them that know the parts of their model, and not the table."""
    parts = (model.tokens, model.positions, model.blocks, model.norm, model.head)
    return AdamW([{"params": part.parameters()} for part in parts])


@pytest.mark.parametrize("build", [of_layers, of_submodules])
def test_a_table_that_no_optimizer_holds_is_told_once(build, caplog):
    model = model_of("sparse")
    optimizer = build(model)
    train(model, optimizer, range(3))
    train(model, build(model), range(2))
    (message,) = said(caplog)
    assert "no optimizer holds parameters of its memory: memory_values. They do not learn" in message


def test_half_keys_that_no_optimizer_holds(caplog):
    """A split by dimensions that forgets what is neither a matrix nor a vector."""
    model = planned_gpt()
    optimizers = [SGD([p for p in model.parameters() if p.dim() == dim], lr=0.1) for dim in (1, 2)]
    model(*batch()).backward()
    for optimizer in optimizers:
        optimizer.step()
    (message,) = said(caplog)
    assert ": 1 parameter of 1 layer (blocks.1.ffn.2)." in message


@pytest.mark.parametrize("why", ["another optimizer holds it", "it is frozen", "the optimizer is of another model"])
def test_a_table_that_is_no_orphan(why, caplog):
    model = model_of("sparse")
    optimizer = of_layers(model)
    others = [SGD([model.memory_values], lr=0.1)] if why == "another optimizer holds it" else []
    if why == "it is frozen":
        model.memory_values.requires_grad_(False)
    if why == "the optimizer is of another model":
        optimizer = AdamW(tiny_gpt(layers=2).parameters())
    train(model, optimizer, range(2))
    assert not said(caplog) and len(others) <= 1


def test_an_optimizer_that_steps_before_the_memory_has_gradients(caplog):
    """It is asked in the first step at which it has some: not while another part is trained."""
    model = planned_gpt()
    optimizer = SGD(model.head.parameters(), lr=0.1)
    optimizer.step()
    assert not said(caplog)
    train(model, optimizer, range(2))
    assert len(said(caplog)) == 1


def test_a_copy_of_a_model_is_told_of_too(caplog):
    """Its head is outside of the module that holds the table."""

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.scale = tiny_gpt(layers=2), nn.Parameter(torch.ones(()))

        def forward(self, *batch):
            return self.model(*batch) * self.scale

    model = WithHead()
    memcompile.plan(model, memory_layers=1, **MEMORY)
    copied = copy.deepcopy(model)
    train(copied, SGD([copied.scale], lr=0.1), range(2))
    (message,) = said(caplog)
    assert "model.memory_values and 7 parameters of 1 layer (model.blocks.1.ffn.2)" in message


# --- explain() -----------------------------------------------------------------------------------------------------


def test_explain_says_what_is_held_as_it_is_now():
    model = tiny_gpt(layers=6)
    kinds = [[p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False)]
    optimizer = SGD([{"params": kind} for kind in kinds], lr=0.1)
    explanation = memcompile.plan(model, memory_layers="all", **MEMORY)
    paths = "(blocks.0.ffn.2, ..., blocks.5.ffn.2)"
    assert repr(explanation).splitlines()[-2:] == [
        f"SGD, group 0, holds memory_values and 24 parameters of 6 layers {paths}",
        f"SGD, group 1, holds 18 parameters of 6 layers {paths}",
    ]
    assert {name for group in explanation.optimizers for name in group.parameters} == {
        name for name, _ in model.named_parameters() if "memory" in name
    }

    del optimizer
    head = AdamW(model.head.parameters())
    explanation = memcompile.explain(model)
    assert repr(explanation).splitlines()[-1] == (
        f"no optimizer holds memory_values and 42 parameters of 6 layers {paths}"
    )
    model.memory_values.requires_grad_(False)
    table = AdamW([model.blocks[0].ffn[2].memory.half_keys])
    explanation = memcompile.explain(model)
    assert [group.parameters for group in explanation.optimizers] == [("blocks.0.ffn.2.memory.half_keys",)]
    assert len(explanation.untrained) == 41 and head.param_groups and table.param_groups
