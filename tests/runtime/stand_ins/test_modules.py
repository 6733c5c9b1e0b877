"""Tools that change projections pass replaced ones by, or are told which to leave out; what is registered runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import nn
from torch.nn.utils import parametrizations

import memcompile
from memcompile.errors import PlanError
from memcompile.runtime.stand_ins.modules import ReplacedLinear
from tests.models import Conv1D, around
from tests.planned import MEMORY, batch, planned_gpt, stop_before_inductor

REPLACED = ["blocks.1.ffn.0", "blocks.1.ffn.2"]


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_replaced_modules_are_listed_and_are_no_linear():
    dense, model = planned_gpt(placement="add", memory_layers=[1]), planned_gpt(memory_layers=[1])
    assert memcompile.replaced_modules(dense) == []
    assert memcompile.replaced_modules(model) == REPLACED
    assert memcompile.replaced_modules(nn.Sequential(model)) == [f"0.{name}" for name in REPLACED]
    assert linears(model) == [name for name in linears(dense) if name not in REPLACED]
    assert repr(model.blocks[1].ffn[0]).startswith("ReplacedLinear(in_features=32, out_features=128: a memory")


def test_other_modules_are_listed_too():
    model = around(
        lambda width, hidden: nn.Sequential(Conv1D(width, hidden), nn.GELU(), Conv1D(hidden, width)), layers=2
    )
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    assert memcompile.replaced_modules(model) == REPLACED
    assert type(model.blocks[1].ffn[0]) is Conv1D


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_them(duplicate):
    twin = duplicate(planned_gpt(memory_layers=[1]))
    assert memcompile.replaced_modules(twin) == REPLACED and type(twin.blocks[1].ffn[0]) is ReplacedLinear


def test_torch_fx_does_not_trace_into_them():
    model, (tokens, _) = planned_gpt(memory_layers=[1]), batch()
    graph_module = torch.fx.symbolic_trace(model, concrete_args={"targets": None})
    assert torch.equal(graph_module(tokens), model(tokens))


def quantize(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def prune_all(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.2)
    return model


def normalize_all(model: nn.Module) -> nn.Module:
    for name in linears(model):
        parametrizations.weight_norm(model.get_submodule(name))
    return model


def watch_all(model: nn.Module) -> nn.Module:
    for name in linears(model):
        model.get_submodule(name).register_forward_hook(
            lambda m, inputs, output: seen.append(output.abs().mean().item())
        )
    seen: list[float] = []
    return model


class Wrapped(nn.Module):
    """As the layers of LoRA and of quantisation libraries: keeps the module, and reads its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(base.weight.detach().abs().max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * self.scale


def wrap_all(model: nn.Module) -> nn.Module:
    for name in linears(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Wrapped(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("tool", [quantize, prune_all, normalize_all, watch_all, wrap_all])
def test_tools_that_walk_linears_pass_them_by(tool):
    model, (tokens, _) = planned_gpt(memory_layers=[1]), batch()
    changed = tool(model)
    assert changed(tokens).isfinite().all()
    ffn = changed.blocks[1].ffn
    assert [type(ffn[0]), type(ffn[2])] == [ReplacedLinear] * 2
    assert not any(ffn[0].parameters()) and ffn[2].memory is not None


POINTED_AT: dict[str, Callable] = {
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "random pruning": lambda module: prune.random_structured(module, "weight", 0.5, dim=0),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "a parameter made of it": lambda module: module.register_parameter("weight_orig", module.weight),
}


@pytest.mark.parametrize("tool", POINTED_AT)
def test_a_tool_that_is_pointed_at_one_is_told_which_to_leave_out(tool):
    model, (tokens, _) = planned_gpt(memory_layers=[1]), batch()
    with pytest.raises((PlanError, ValueError), match=r"memcompile\.replaced_modules\(model\) lists"):
        POINTED_AT[tool](model.blocks[1].ffn[0])
    model(tokens)


class ModulesToSave(nn.Module):
    """As PEFT's wrapper of that name: a copy runs and is trained."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original = module.requires_grad_(False)
        self.copy = copy.deepcopy(module).requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.copy(x)


@pytest.mark.parametrize("placement", ["replace", "add"])
def test_a_wrapper_of_the_memory_runs(placement, monkeypatch):
    captured = stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)
    model, (tokens, targets) = planned_gpt(memory_layers=[1], placement=placement), batch()
    model.requires_grad_(False)
    holder = model.blocks[1].ffn[2]
    holder.memory = ModulesToSave(holder.memory)
    before = model(tokens)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(tokens, targets).backward()
    assert holder.memory.copy.out_weight.grad.any()
    assert all(p.grad is None for p in holder.memory.original.parameters())
    optimizer.step()
    after = model(tokens)
    assert not torch.equal(after, before)
    assert torch.equal(torch.compile(model, backend="memcompile", fullgraph=True)(tokens), after) and captured
    assert {name.rpartition("memory.")[2].partition(".")[0] for name, _ in _layer_parameters(model)} == {
        "original",
        "copy",
    }


def _layer_parameters(model: nn.Module) -> list:
    from memcompile.runtime.pool import pool_of

    return [(name, p) for name, p in pool_of(model).memory_parameters() if name != "memory_values"]


def test_any_module_in_its_place_runs():
    model, (tokens, _) = planned_gpt(memory_layers=[1]), batch()
    holder = model.blocks[1].ffn[2]
    expected = model(tokens)
    holder.memory = nn.Sequential(holder.memory, nn.Dropout(0.0))
    assert torch.equal(model(tokens), expected)
    holder.memory = nn.Sequential(holder.memory, nn.Threshold(1e9, 0.0))
    assert not torch.equal(model(tokens), expected)
