"""Programs that build their optimizers in their own ways train, save, resume and go on bit for bit.

Each has the order of calls of such a program. The first run builds the optimizer before the line that compiles the
model with a memory. The resumed run plans the model for the checkpoint, and builds the optimizer after that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import memcompile
from tests.models import tiny_gpt
from tests.planned import MEMORY, assert_same, batch, stop_before_inductor

LINE: dict[str, Any] = {"backend": "memcompile", "memory_layers": 2, **MEMORY}


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)


def train(run: Callable, optimizers: Iterable[Optimizer], steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = run(*batch(step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def assert_resumes(build: Callable[[nn.Module], list[Optimizer]], values_grad: str) -> None:
    """Trains 6 steps, and again 3 steps, a checkpoint in a file, and 3 steps by new objects."""
    torch.manual_seed(0)
    model = tiny_gpt(layers=3)
    optimizers = build(model)
    compiled = torch.compile(model, values_grad=values_grad, **LINE)
    first = train(compiled, optimizers, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, file)
    expected = train(compiled, optimizers, range(3, 6))
    assert len(first) == 3 and all(p.grad is None for p in model.parameters()), "an optimizer holds every parameter"

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    resumed = tiny_gpt(layers=3)
    memcompile.plan(resumed, memory=memcompile.config_from(saved["model"]))
    resumed.load_state_dict(saved["model"])
    again = build(resumed)
    for optimizer, state in zip(again, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    assert train(torch.compile(resumed, backend="memcompile"), again, range(3, 6)) == expected
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_parameters_that_are_sorted_by_name(values_grad):
    """As minGPT does: those that decay, and the rest, each sorted."""

    def build(model: nn.Module) -> list[Optimizer]:
        named = dict(model.named_parameters())
        decay = {name for name, parameter in named.items() if parameter.dim() > 1}
        groups = [
            {"params": [named[name] for name in sorted(decay)], "weight_decay": 0.1},
            {"params": [named[name] for name in sorted(named.keys() - decay)], "weight_decay": 0.0},
        ]
        return [AdamW(groups, lr=1e-2, betas=(0.9, 0.95))]

    assert_resumes(build, values_grad)


@pytest.mark.parametrize("values_grad", ["sparse", "dense"])
def test_one_group_a_block(values_grad):
    """Rates that fall from block to block, and a last group of the rest: embeddings, head, and the table where the
    optimizer is built after the plan.
    """

    def build(model: nn.Module) -> list[Optimizer]:
        groups = [{"params": [*block.parameters()], "lr": 1e-2 * 0.5**i} for i, block in enumerate(model.blocks)]
        in_blocks = {id(parameter) for group in groups for parameter in group["params"]}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in in_blocks]
        return [AdamW([*groups, {"params": rest}], lr=1e-3)]

    assert_resumes(build, values_grad)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("split", ["by blocks", "by size", "by dimensions"])
def test_muon_for_matrices_and_adamw_for_the_rest(split):
    def build(model: nn.Module) -> list[Optimizer]:
        named = [*model.named_parameters()]
        if split == "by size":
            named.sort(key=lambda item: -item[1].numel())
        in_muon = {name for name, p in named if p.dim() == 2 and (split == "by dimensions" or "blocks" in name)}
        in_muon -= {name for name, p in named if memcompile.is_table(p)}
        muon = torch.optim.Muon([p for name, p in named if name in in_muon], lr=1e-2)
        return [muon, AdamW([p for name, p in named if name not in in_muon], lr=1e-2)]

    assert_resumes(build, "sparse")
