"""The rewrite works on every model of the zoo: eager, trained, checkpointed, captured, compiled, and added to."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile.runtime.pool import pool_of
from tests.planned import MEMORY, lookups, stop_before_inductor
from tests.zoo import MODELS
from tests.zoo.entry import Entry

STEPS = 20
# What keeps a part of these from working, in our own words or in those of the refusal.
BREAKS_INSIDE_FFN = {"Bloom"}  # Dynamo breaks the graph at its autograd.Function: the lookup runs eagerly
CANNOT_BE_ADDED_TO = {"Bloom": "an autograd.Function takes tensors alone"}

FIRST_OF_FAMILY = {entry.family: entry for entry in reversed(MODELS)}.values()

every_model = pytest.mark.parametrize("entry", MODELS, ids=str)


def planned(entry: Entry, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model with memory at every FFN, in train mode, and its inputs."""
    model, inputs = entry.new()
    memcompile.plan(model, memory_layers="all", example_inputs=inputs, **MEMORY | options)
    return model, inputs


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of what a model returned."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or else the distance of its first output from a random target."""
    if isinstance(output, dict) and output.get("loss") is not None:
        return output["loss"]
    first = next(tensor for tensor in tensors_in(output) if tensor.requires_grad)
    if first.dim() == 0:
        return first
    target = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    return (first - target).square().mean()


def run(model: Any, inputs: dict[str, Any]) -> Any:
    """One forward under a fixed seed: the same dropout every time."""
    torch.manual_seed(1)
    return model(**inputs)


def gradients(model: nn.Module, output: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(output).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, float]:
    """The loss before and after STEPS steps on one batch under one seed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS + 1):
        loss = loss_of(run(model, inputs))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@every_model
def test_ffn_is_gone_and_memory_learns(entry):
    model, inputs = planned(entry)
    pool = pool_of(model)
    assert pool.chosen
    gone = {name for site in pool.chosen for name in site.parameters}
    assert gone.isdisjoint(model.state_dict())
    assert gone.isdisjoint(name for name, _ in model.named_parameters())

    memory = {pool.prefix + name: parameter for name, parameter in pool.memory_parameters()}
    learned = gradients(model, run(model, inputs))
    assert [name for name in memory if name not in learned or not learned[name].any()] == []

    first, last = train(copy.deepcopy(model), inputs)
    assert last < 0.8 * first, "the model does not learn"
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is of_memory for of_memory in memory.values()))
    first, last = train(model, inputs)
    assert last < first, "the memory alone does not learn"


def enable_checkpointing(model: nn.Module) -> None:
    """As the model's own library does it, or else around the modules that own the FFNs."""
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    for site in pool_of(model).chosen:
        owner = model.get_submodule(site.name)
        owner.forward = functools.partial(checkpoint, owner.forward, use_reentrant=False)


@every_model
def test_gradient_checkpointing_gives_the_same_gradients(entry):
    model, inputs = planned(entry)
    expected = gradients(model, run(model, inputs))
    enable_checkpointing(model)
    calls = count_lookups(model)
    actual = gradients(model, run(model, inputs))
    assert len(calls) > sum(site.calls for site in pool_of(model).chosen), "nothing was recomputed"
    torch.testing.assert_close(actual, expected)


def count_lookups(model: nn.Module) -> list[str]:
    """Grows with every forward of a memory layer."""
    calls: list[str] = []
    for name, layer in pool_of(model).layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    return calls


@every_model
def test_added_memory_changes_nothing_at_first(entry):
    if entry.name in CANNOT_BE_ADDED_TO:
        with pytest.raises(memcompile.PlanError, match=CANNOT_BE_ADDED_TO[entry.name]):
            planned(entry, placement="add")
        return
    dense, inputs = entry.new()
    model, _ = planned(entry, placement="add")
    kept = {name for name, _ in dense.named_parameters()}
    assert kept < {name for name, _ in model.named_parameters()}
    calls = count_lookups(model)
    for training in (True, False):
        expected = tensors_in(run(dense.train(training), inputs))
        actual = tensors_in(run(model.train(training), inputs))
        assert len(actual) == len(expected) > 0
        assert all(map(torch.equal, actual, expected)), f"outputs differ where training={training}"
    assert len(calls) == 2 * sum(site.calls for site in pool_of(model).chosen)


def assert_same_run(compiled: Any, model: nn.Module, inputs: dict[str, Any], **tolerance: float) -> None:
    """Compiled gives what eager gives: outputs, and gradients in train mode."""
    expected, actual = run(model, inputs), run(compiled, inputs)
    torch.testing.assert_close(tensors_in(actual), tensors_in(expected), **tolerance)
    if model.training:
        torch.testing.assert_close(gradients(model, actual), gradients(model, expected), **tolerance)


@pytest.mark.parametrize(
    ("entry", "training"),
    [(entry, True) for entry in MODELS] + [(entry, False) for entry in FIRST_OF_FAMILY],
    ids=str,
)
def test_captured_equals_eager(entry, training, monkeypatch):
    captured = stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)
    model, inputs = planned(entry)
    assert_same_run(torch.compile(model.train(training), backend="memcompile"), model, inputs)
    inner = [module for graph in captured for module in graph.modules() if isinstance(module, fx.GraphModule)]
    if entry.name not in BREAKS_INSIDE_FFN:
        assert sum(lookups(module.graph) for module in inner) == sum(site.calls for site in pool_of(model).chosen)


def test_compiled_equals_eager():
    (entry,) = (entry for entry in MODELS if entry.name == "einsum")  # Inductor takes its time
    model, inputs = planned(entry)
    compiled = torch.compile(model, backend="memcompile")
    for training in (True, False):
        model.train(training)
        assert_same_run(compiled, model, inputs, rtol=1e-4, atol=1e-5)
